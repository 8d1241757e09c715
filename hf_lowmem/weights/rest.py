"""A weight at rest: codes beside a parameter that has kept its name, shape and dtype, and no values.

The parameter stays what optimizers, engines and checkpoints know: one `nn.Parameter` with one name and one gradient.
What it has for values is one NaN, seen under the weight's shape, 2 bytes in all. Whoever reads it gets an error with
its name (`EmptyParameter`), and who gets by that, in C++, gets NaN and never another number.

Why not a storage that is emptied and filled again around each layer (`untyped_storage().resize_`, as FSDP does it):
reading an empty one crashes a process or reads memory of somebody else, and a backward pass that enters a layer by a
way of its own, such as a router's loss, reads it before anybody has filled it. And a whole layer is in bf16 then, where
here it is one matrix. Why no tensor subclass that decodes itself: see hf_lowmem/optim/base.py.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from hf_lowmem.distributed import Shards, held
from hf_lowmem.weights import int8

__all__ = ["AtRest", "EmptyParameter", "at_rest", "empty", "fill", "load", "move", "refuse"]

logger = logging.getLogger(__name__)

WAKE = "model.state_dict() has copies on the CPU, and hf_lowmem.weights.wake(model) makes it a plain model again"


class AtRest:
    """Codes and scales of one weight, on the weight's device.

    Attributes:
        name: of the parameter, without wrappers.
        codes: int8, flat.
        scale: fp32, flat, one for each `group` codes.
        writes: a list of one number: how often the codes were written. A part of a weight shares it.
        expected: scales that the next values to be loaded were saved with, perhaps.
        fits: whether the first values were those of codes with the scales that were given.
        home: where the other rows are, of a weight that FSDP2 has cut; codes and scales are those of the rows here.
        said: what it is and by which field, in errors.
        trained: whether an optimizer writes it.
    """

    said = "at rest in int8 (lowmem_weights='int8_sr')"
    trained = True
    home: Shards | None = None

    def __init__(self, name: str, values: Tensor, scale: Tensor | None = None, home: Shards | None = None) -> None:
        group = int8.group_of(values.shape)
        assert group is not None, f"{name}: {tuple(values.shape)}"
        self.name, self.shape, self.dtype, self.group = name, values.shape, values.dtype, group
        self.codes = torch.empty(values.numel(), dtype=torch.int8, device=values.device)
        self.scale = torch.full((values.numel() // group,), int8.TINY, device=values.device)
        self.writes = [0]
        self.home = home
        self.expect(scale)
        self.fits = self.replace(values)

    def expect(self, scale: Tensor | None) -> None:
        """Note the scales, of the whole weight, that the next values to be loaded were saved with."""
        self.expected: Tensor | None = scale
        if scale is not None and self.home is not None and scale.numel() % (rows := self.home.size[0]) == 0:
            self.expected = self.home.rows(scale.view(rows, -1)).reshape(-1)

    def scales(self) -> Tensor:
        """Scales of the whole weight: a collective call where it is cut."""
        if self.home is None:
            return self.scale
        return self.home.gather(self.scale.view(self.shape[0], -1), self.home.size[0]).view(-1)

    def decode(self) -> Tensor:
        """The weight in its own dtype."""
        return int8.decode(self.codes, self.scale, self.shape, self.dtype, group=self.group)

    def load(self) -> Tensor:
        """The weight in fp32, where it is exact."""
        return int8.decode(self.codes, self.scale, self.shape, torch.float32, group=self.group)

    def save(self, values: Tensor, seed: int | None, first: int = 0) -> None:
        """Write what `load` gave and an update has changed. `first`: place of the first value in the whole weight."""
        self.writes[0] += 1
        int8.encode_(values.view(-1), self.codes, self.scale, group=self.group, seed=seed, first=first)

    def rows(self, rows: Tensor) -> Tensor:
        """Some rows, in the weight's own dtype."""
        return int8.decode_rows(self.codes, self.scale, rows, self.shape[-1], self.dtype, group=self.group)

    def part(self, start: int, stop: int, rows: int | None = None) -> "AtRest":
        """The weight's values from `start` to `stop`: a view. They are flat, or so many whole rows."""
        made = object.__new__(AtRest)
        vars(made).update(vars(self))
        made.shape = torch.Size([stop - start] if rows is None else [rows, *self.shape[1:]])
        made.codes, made.scale = self.codes[start:stop], self.scale[start // self.group : stop // self.group]
        return made

    @torch.no_grad()
    def replace(self, values: Tensor) -> bool:
        """Take other values, which are rounded to the nearest codes. Returns whether they are what `decode` gives now.

        They are where they were saved from such a weight and its scales are `expected`, or are the present ones.
        """
        if not simulated(values) and not bool(values.isfinite().all()):
            raise ValueError(f"{self.name} has NaN or Inf among its values, for which there is no int8 code.")
        self.writes[0] += 1
        if values.is_meta or isinstance(values, FakeTensor):  # which has no values, and most of a plan's time
            self.expected = None
            return False
        flat = values.detach().to(self.scale.device, self.dtype).reshape(-1).float()
        found, self.expected = self.expected, None
        for scale in (found, self.scale):
            if scale is not None and scale.shape == self.scale.shape and self._fits(flat, scale.to(self.scale)):
                return True
        self.scale.fill_(int8.TINY)
        int8.encode_(flat, self.codes, self.scale, group=self.group)
        return False

    def _fits(self, flat: Tensor, scale: Tensor) -> bool:
        """Whether values are those of codes with these scales, which are then taken."""
        if simulated(flat) or not bool(((scale > 0) & (int8.scale_of(scale * int8.TOP) == scale)).all()):
            return False
        codes = (flat.view(-1, self.group) / scale[:, None]).round_()
        if not bool((codes.abs() <= int8.TOP).all()):
            return False
        codes = codes.to(torch.int8).view(-1)
        if not torch.equal(int8.decode(codes, scale, flat.shape, self.dtype, group=self.group), flat.to(self.dtype)):
            return False
        self.codes.copy_(codes)
        self.scale.copy_(scale)
        return True

    def stored(self) -> tuple[Tensor, Tensor]:
        """The tensors that it consists of."""
        return self.codes, self.scale


def simulated(tensor: Tensor) -> bool:
    """Whether a tensor has no values to look at: on the meta device, or in a simulation of a step."""
    return tensor.is_meta or torch._C._len_torch_dispatch_stack() > 0


def at_rest(p: Tensor | None) -> AtRest | None:
    """Codes and scales of a parameter that is at rest, of the part on this process; None of any other."""
    return None if p is None else getattr(held(p), "lowmem_at_rest", None)


def _of_tensor(how: str | None, *names: str) -> Iterator[object]:
    """Methods of torch.Tensor, or how its attributes are read (`__get__`), set or deleted."""
    return (getattr(Tensor, name) if how is None else getattr(getattr(Tensor, name), how) for name in names)


# What may be asked of a parameter without values: all that does not depend on them.
ALLOWED: set[object] = {
    *_of_tensor(
        "__get__",
        *("shape", "dtype", "device", "layout", "requires_grad", "grad", "grad_fn", "is_leaf", "ndim", "_version"),
        *("is_cuda", "is_cpu", "is_meta", "is_sparse", "is_sparse_csr", "is_quantized", "is_mkldnn", "is_nested"),
        *("itemsize", "nbytes", "output_nr", "retains_grad", "_base", "_backward_hooks", "is_xpu", "is_mps"),
        "_post_accumulate_grad_hooks",
    ),
    *_of_tensor("__set__", "grad", "requires_grad", "_post_accumulate_grad_hooks"),
    *_of_tensor("__delete__", "grad"),
    *_of_tensor(
        None,
        *("size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "storage_offset", "__len__"),
        *("is_floating_point", "is_complex", "is_signed", "is_inference", "get_device"),
        *("untyped_storage", "register_hook", "register_post_accumulate_grad_hook", "requires_grad_", "__hash__"),
        *("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"),
    ),
    *(torch.is_floating_point, torch.is_complex, torch.numel, torch.empty_like, torch.zeros_like, torch.ones_like),
    *(torch.full_like, torch.rand_like, torch.randn_like),
    torch._has_compatible_shallow_copy_type,  # what `module.to` asks
}
(SET_DATA,) = _of_tensor("__set__", "data")


class EmptyParameter(nn.Parameter):
    """The class of a parameter while it is at rest: says what it is, takes values to encode, gives none.

    A parameter's class is exchanged, as torch's own lazy ones do it, so that the object stays the one that everybody
    has.
    """

    lowmem_at_rest: AtRest

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func in ALLOWED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        p, *others = args or (None,)
        if isinstance(p, EmptyParameter):
            if func is Tensor.is_contiguous:  # as the weight was; who asks, such as FSDP2, is told at the next question
                return True
            if func is Tensor.copy_ and isinstance(others[0], Tensor) and at_rest(others[0]) is None:
                load(p.lowmem_at_rest, p, others[0])
                return p
            if func == SET_DATA and others[0] is p:  # `module.to` of where and what it is
                return None
            if func is Tensor.to and _stays(p, others, kwargs):
                return p
            if func in (Tensor.bfloat16, Tensor.cpu, Tensor.cuda) and not others and _is_already(p, func.__name__):
                return p
        said, owner = getattr(func, "__name__", str(func)), getattr(func, "__self__", None)
        name = getattr(owner, "__name__", said)  # of the attribute that is read or set
        said = f".{name}" if said.startswith("__") and owner is not None else said
        return refuse(next(_in((args, kwargs))).lowmem_at_rest, said)

    def __repr__(self) -> str:
        return f"{self.lowmem_at_rest.name}: {self.dtype} {tuple(self.shape)}, {self.lowmem_at_rest.said}"

    def __deepcopy__(self, memo: object) -> NoReturn:
        refuse(self.lowmem_at_rest, "copy.deepcopy")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse(self.lowmem_at_rest, "pickle")


def load(kept: AtRest, p: Tensor, values: Tensor) -> None:
    """Take values for a parameter at rest, as `load_state_dict` writes them."""
    if values.shape != p.shape:
        raise RuntimeError(f"{kept.name}: values of shape {tuple(values.shape)} for {tuple(p.shape)}.")
    if p.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{kept.name}: a leaf that requires grad is written to. Use torch.no_grad().")
    if not kept.replace(values) and kept.trained:
        _say_rounded()


@functools.cache
def _say_rounded() -> None:
    logger.warning(
        "values were loaded into weights at rest in int8, and rounded to codes anew, since their scales were not "
        "there: a run that goes on from them is near to the one before, and not the same. save_pretrained, checkpoints "
        "of our trainers and accelerator.save_state after LowMemPlugin.prepare keep the scales."
    )


def _stays(p: EmptyParameter, args: Sequence[object], kwargs: dict[str, object]) -> bool:
    """Whether `p.to(...)` would leave it where and what it is."""
    if kwargs.get("copy"):
        return False
    for value in (*args, *kwargs.values()):
        if isinstance(value, str | torch.device):
            device = torch.device(value)
            if device.type != p.device.type or device.index not in (None, p.device.index):
                return False
        elif isinstance(value, torch.dtype):
            if value != p.dtype:
                return False
        elif not (value is None or isinstance(value, bool | torch.memory_format)):  # another tensor, a device's number
            return False
    return True


def _is_already(p: EmptyParameter, name: str) -> bool:
    """Whether a parameter has the dtype or the kind of device that a method is called after."""
    return name in (str(p.dtype).removeprefix("torch."), p.device.type)


def _in(value: object) -> Iterator[EmptyParameter]:
    """Parameters at rest among the arguments of a call, however deep."""
    if isinstance(value, EmptyParameter):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _in(item)


def refuse(kept: AtRest, said: str, remedy: str = WAKE) -> NoReturn:
    """Raise for who asks for values of a weight at rest. `said`: what was called."""
    raise RuntimeError(
        f"{kept.name} is {kept.said}, and has no values to give to {said!r}: they are there only inside of its own "
        f"layer. {remedy}."
    )


def empty(p: nn.Parameter, kept: AtRest) -> None:
    """Take the values out of a parameter of which `kept` was made."""
    _set_nan(p, p.device)
    vars(p)["lowmem_at_rest"] = kept
    if type(p) is nn.Parameter:  # a simulation's has a class of its own
        object.__setattr__(p, "__class__", EmptyParameter)


def _set_nan(p: nn.Parameter, device: torch.device) -> None:
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        p.data = torch.full((), torch.nan, dtype=p.dtype, device=device).expand(p.shape)


def move(p: nn.Parameter, fn: Callable[[Tensor], Tensor]) -> None:
    """Do to a parameter at rest what `fn` does to a module's tensors: move it. A cast is refused."""
    kept = at_rest(p)
    assert kept is not None
    moved = fn(torch.empty(0, dtype=p.dtype, device=p.device))
    if moved.dtype != p.dtype:
        refuse(kept, f"a cast to {moved.dtype}")
    if moved.device != p.device:
        grad, p.grad = p.grad, None
        kept.codes, kept.scale = kept.codes.to(moved.device), kept.scale.to(moved.device)
        _set_nan(p, moved.device)
        p.grad = None if grad is None else grad.to(moved.device)


def fill(p: nn.Parameter) -> None:
    """Make a plain parameter of one that is at rest."""
    kept = at_rest(p)
    assert kept is not None
    if isinstance(p, EmptyParameter):
        object.__setattr__(p, "__class__", nn.Parameter)
    del vars(p)["lowmem_at_rest"]
    with torch.no_grad():
        p.data = kept.decode()
