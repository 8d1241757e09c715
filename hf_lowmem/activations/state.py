"""What a module computes with, beside its input: so that running it again is the same computation.

Between a forward and its backward pass a module may change: `set_adapter` makes another adapter the active one,
`eval()` switches dropouts off, `torch.func.functional_call` has lent it weights and taken them back, hooks come and
go. Plain autograd does not notice, because it has kept what it needs. Whoever computes again must therefore have the
module as it was. A `State` is that: of every module below, the attributes (flags, adapters, hooks, submodules) and the
very tensors that stood in them. `again()` puts them back for the time of a second run and then leaves the module as it
found it.

The values of tensors are not copied. What was written in place is known by its version counter: a tensor that the
module itself writes to while it runs (a batch norm's statistics, spectral_norm's vectors) makes a second run another
one, and `written()` says so; one that somebody writes to before backward is an error, as in autograd. Attributes are
seen, and what is in dicts, lists and sets, and a generator of the module's own; the insides of other objects are not.
"""

import contextlib
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["State", "changed_in_place", "version_of"]

_ABSENT = object()
_VALUES = frozenset((bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size))
_MAPPINGS = (dict, OrderedDict)
_MUTABLE = frozenset((*_MAPPINGS, list, set))
_CONTAINERS = _MUTABLE | {tuple}


def version_of(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def changed_in_place(tensor: Tensor, expected: int) -> RuntimeError:
    """The error that autograd raises for a saved tensor, which it leaves to hooks to find."""
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"[{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; expected version {expected} instead."
    )


class _Held:
    """A tensor of a module: itself if it is a leaf, else without its graph, which would live on with it."""

    __slots__ = ("copy", "of", "tensor", "version", "wants")

    def __init__(self, tensor: Tensor) -> None:
        self.wants = tensor.requires_grad
        self.of = weakref.ref(tensor)
        self.tensor = tensor if tensor.is_leaf else tensor.detach().requires_grad_()
        self.version = version_of(tensor)
        self.copy: Tensor | None = None

    def is_still(self, value: Any) -> bool:
        return self.of() is value and self.copy is None and value.requires_grad == self.wants

    def thawed(self) -> Tensor:
        if self.copy is not None:
            return self.copy.clone()  # what runs again may write to it
        same = self.tensor.requires_grad == self.wants
        return self.tensor if same else self.tensor.detach().requires_grad_(self.wants)


def _frozen(value: Any, held: list[_Held]) -> Any:
    """`value` as it is now: containers are copied, tensors held."""
    kind = type(value)
    if kind in _VALUES:
        return value
    if kind in _CONTAINERS:
        if not value or kind is set:
            return kind(value)
        if kind in _MAPPINGS:
            return kind((key, _frozen(item, held)) for key, item in value.items())
        return kind(_frozen(item, held) for item in value)
    if isinstance(value, Tensor):
        held.append(_Held(value))
        return held[-1]
    if kind is torch.Generator:
        return value.clone_state()
    return value


def _thawed(frozen: Any) -> Any:
    kind = type(frozen)
    if kind is _Held:
        return frozen.thawed()
    if kind in _MAPPINGS:
        return kind((key, _thawed(item)) for key, item in frozen.items())
    if kind is torch.Generator:
        return frozen.clone_state()
    return kind(map(_thawed, frozen)) if kind in (list, tuple) else set(frozen) if kind is set else frozen


def _same(frozen: Any, now: Any) -> bool:
    if frozen is now:
        return True
    kind = type(frozen)
    if kind is _Held:
        return frozen.is_still(now)
    if kind is not type(now):
        return False
    if kind in _MAPPINGS:
        return frozen.keys() == now.keys() and all(_same(item, now[key]) for key, item in frozen.items())
    if kind in (list, tuple):
        return len(frozen) == len(now) and all(map(_same, frozen, now))
    return (kind is set or kind in _VALUES) and frozen == now


def _lend(now: dict[str, Any], frozen: dict[str, Any]) -> None:
    """Give a module the attributes that it had."""
    for key, item in frozen.items():
        if not _same(item, now.get(key, _ABSENT)):
            now[key] = _thawed(item)
    if len(now) != len(frozen):
        for key in now.keys() - frozen.keys():
            del now[key]


class _Present:
    """A module's attributes before a second run, which may count its calls or change an adapter's flags once more."""

    def __init__(self, now: dict[str, Any]) -> None:
        self.now, self.before = now, dict(now)
        self.contents = {key: item.copy() for key, item in now.items() if type(item) in _MUTABLE and item}

    def give_back(self) -> None:
        if len(self.now) != len(self.before):
            for key in self.now.keys() - self.before.keys():
                del self.now[key]
        for key, item in self.before.items():
            if self.now.get(key, _ABSENT) is not item:
                self.now[key] = item
            if type(item) in _MUTABLE and not self.untouched(key, item):
                item.clear()
                (item.extend if type(item) is list else item.update)(self.contents.get(key, ()))

    def untouched(self, key: str, item: Any) -> bool:
        was = self.contents.get(key)
        if not was or len(was) != len(item):
            return not was and not item
        pairs = zip(was.values(), item.values(), strict=True) if type(was) in _MAPPINGS else zip(was, item, strict=True)
        return all(a is b for a, b in pairs)


class State:
    """`module` and all modules below it, as they are when it is made.

    copies: keeps the values of buffers as well. After the run `settle()` lets go of those that it did not write to; the
    others are had back by `again()`, so that a second run neither reads nor leaves what the first one wrote.
    """

    def __init__(self, module: nn.Module, copies: bool = False) -> None:
        self.name = type(module).__name__
        self.held: list[_Held] = []
        self.parts: list[tuple[nn.Module, dict[str, Any]]] = []
        for part in module.modules() if module._modules else (module,):
            self.parts.append((part, {key: _frozen(item, self.held) for key, item in vars(part).items()}))
        if copies:
            for _, frozen in self.parts:
                for buffer in frozen["_buffers"].values():
                    if buffer is not None:
                        buffer.copy = buffer.tensor.detach().clone()

    def written(self) -> bool:
        """Whether a tensor was written to."""
        return any(version_of(held.tensor) != held.version for held in self.held)

    def settle(self) -> None:
        """After the run of a module of which copies were made."""
        for held in self.held:
            if version_of(held.tensor) == held.version:
                held.copy = None

    def check(self) -> None:
        """Raise RuntimeError if a second run could not have the values of the first."""
        if any(held.copy is None and version_of(held.tensor) != held.version for held in self.held):
            raise RuntimeError(
                f"a weight or a buffer of {self.name} was changed in place between the forward pass and the backward "
                "pass, which needs it to compute the module's output again. Step the optimizer after backward."
            )

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """The modules as they were. Raises RuntimeError where they cannot be."""
        self.check()
        present = [_Present(vars(part)) for part, _ in self.parts]
        try:
            for part, frozen in self.parts:
                _lend(vars(part), frozen)
            yield
        finally:
            for part in present:
                part.give_back()
