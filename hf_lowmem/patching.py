"""Three things that whoever stands between a module and autograd needs: a place in a forward, a check, and a mode.

`ForwardPatch` is the one way to stand in for `module.forward`. It is an instance attribute, so the module's class, its
name, its parameters, its hooks and its state dict stay what they are. It is an object and no closure, because it must
be copied and pickled with its module, and then belong to the copy. (nn.DataParallel's replicas, whose attributes are
copied without that care, are the exception: use DDP.) Several may stand on one module, each around the one before; they
are taken away in any order.

`check_version` is the check that autograd makes of every saved tensor, and leaves to the hooks where there are any.
"""

import contextlib
import inspect
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "ForwardPatch",
    "check_version",
    "forwards_of",
    "in_eval_mode",
    "in_transform",
    "version_of",
]


class ForwardPatch:
    """A callable for the place of `module.forward`. A subclass says in `__call__` what it does around `original`.

    Attributes:
        module: whose forward it is.
        inner: the instance attribute that was found there, ours or somebody else's; None for the class's own forward,
            which is then found at each call.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.inner: Callable[..., Any] | None = vars(module).get("forward")

    @property
    def original(self) -> Callable[..., Any]:
        return self.inner or type(self.module).forward.__get__(self.module)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    def put(self) -> None:
        """Stand around whatever is the module's forward now. Does nothing where it stands already."""
        if self not in forwards_of(self.module):
            self.inner = vars(self.module).get("forward")
            vars(self.module)["forward"] = self

    def take_away(self) -> bool:
        """Leave the others as they are. False where it is not found: gone already, or under a forward not of ours."""
        outer: ForwardPatch | None = None
        for patch in forwards_of(self.module):
            if patch is self:
                if outer is not None:
                    outer.inner = self.inner
                elif self.inner is None:
                    del vars(self.module)["forward"]
                else:
                    vars(self.module)["forward"] = self.inner
                return True
            outer = patch
        return False


def forwards_of(module: nn.Module) -> Iterator[ForwardPatch]:
    """The patches of a module that can be reached, the outermost first: down to the first that is not of ours."""
    forward = vars(module).get("forward")
    while isinstance(forward, ForwardPatch):
        yield forward
        forward = forward.inner


def version_of(tensor: Tensor) -> int:
    """Number of in-place changes of a tensor so far. An inference tensor does not count them: -1."""
    return -1 if tensor.is_inference() else tensor._version


def check_version(tensor: Tensor, expected: int) -> None:
    """Raise RuntimeError, in autograd's words, if a saved tensor was changed in place since it had that version."""
    if (found := version_of(tensor)) != expected:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{tensor.type()} {list(tensor.shape)}] is at version {found}; expected version {expected} instead."
        )


def in_transform() -> bool:
    """Whether a transform of torch.func runs, which has no saved tensors."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # type: ignore[attr-defined]


@contextlib.contextmanager
def in_eval_mode(model: nn.Module, *, but: Callable[[nn.Module], bool] = lambda module: False) -> Generator[None]:
    """Put all modules of `model` in eval mode; afterwards each is in its own mode again, also after an exception.

    By the flags alone, since a module's own `train()` may do more than set them.

    Args:
        but: whether a module keeps its mode.
    """
    modes = {part: part.training for part in model.modules() if not but(part)}
    try:
        for part in modes:
            part.training = False
        yield
    finally:
        for part, training in modes.items():
            part.training = training
