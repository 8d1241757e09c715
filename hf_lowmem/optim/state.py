"""States: their declarations, the whole numbers beside them, and where random streams start.

The whole numbers of a state, `step` and `key`, are tensors without a dimension on the CPU, as torch's `step` is: a
distributed checkpoint is loaded into a state's tensors in place, and a Python number has no place. Reading one asks no
accelerator. They are real tensors also in a step on fake ones, which are planned with: a method branches on them.
"""

import ctypes
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeGuard

import torch
from torch import Tensor

# torch has no public way out of a dispatch mode, nor to know which are on.
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack  # pyright: ignore[reportPrivateUsage]

from hf_lowmem.codecs import CODECS, StateCodec

dispatch_modes = _get_current_dispatch_mode_stack  # those that this thread is in

Shape = torch.Size
Group = dict[str, Any]

# How much of a parameter the update of one of its values sees: that value, its row (along dimension 0), of all other
# rows no more than the norm of its column, or all of it.
Reach = Literal["value", "row", "column", "whole"]

# The sum of projected gradients, between the backward passes of one window.
WINDOW = "window"

# The int8 beside a bf16 weight that is stored with 24 bits.
CORRECTION = "correction"

# In the state of a sharded parameter: its tensors are laid out by rows; see hf_lowmem/optim/sharded.py.
BY_ROWS = "by_rows"

# How many gradients the sum in int8 has that a state holds within a window; see hf_lowmem/optim/accumulator.py.
ADDED = "added"

# Of a basis that is refreshed the less often the less it moves; see hf_lowmem/optim/lowrank/projector.py. How much of
# the last one it was made from is in a basis, the update at which the next is due, and its interval in `update_gap`s.
OVERLAP, DUE, STRETCH = "overlap", "due", "stretch"

# The whole numbers of a state.
COUNTS = ("step", "key", BY_ROWS, ADDED, DUE, STRETCH)
COUNT_BYTES = 8


def count(value: int) -> Tensor:
    """A whole number of a state."""
    return _really(torch.tensor, value, dtype=torch.int64, device="cpu")


def number(value: Tensor | int) -> int:
    """The int in a whole number of a state: a tensor that `count` made, or a plain number, as version 0.1.0 had."""
    return int(_really(value.item)) if isinstance(value, Tensor) else value


class Counted:
    """A whole number of a state, read and counted in its memory: torch's own operators take ten times as long."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._tensor: Tensor | None = None

    def read(self, raw: Mapping[str, Tensor | int]) -> int:
        """The number; 0 where there is none yet, which stays so."""
        found = raw.get(self.name)
        if found is None:
            return 0
        return self._memory_of(found).value if _in_host_memory(found) else number(found)

    def one_more(self, raw: dict[str, Any]) -> int:
        """Count one more, in place; the new number."""
        found = raw.get(self.name)
        if found is None or (found is not self._tensor and not _in_host_memory(found)):
            raw[self.name] = found = count(0 if found is None else number(found))
        memory = self._memory_of(found)
        memory.value += 1
        return memory.value

    def _memory_of(self, found: Tensor) -> ctypes.c_int64:
        address = found.data_ptr()
        if found is not self._tensor or address != self._address:
            self._tensor, self._address = found, address  # kept alive, and so its memory is
            self._memory = ctypes.c_int64.from_address(address)
        return self._memory


def _in_host_memory(value: object) -> TypeGuard[Tensor]:
    """Whether it is a whole number as `count` makes them, of no other kind of tensor, which may have no memory."""
    return type(value) is Tensor and (value.device.type, value.dtype, value.dim()) == ("cpu", torch.int64, 0)


def in_dispatch_mode() -> bool:
    """Whether torch's operators go to somebody else first, as under FakeTensorMode."""
    return torch._C._len_torch_dispatch_stack() > 0  # pyright: ignore[reportPrivateUsage]


def _really(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `function` outside of every dispatch mode; asking whether there is one takes no time."""
    if not in_dispatch_mode():
        return function(*args, **kwargs)
    with _disable_current_modes():
        return function(*args, **kwargs)


def values_of(raw: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state that an update changes: all but its whole numbers."""
    return {k: v for k, v in raw.items() if isinstance(v, Tensor) and k not in COUNTS}


def as_parameter(shape: Shape, group: Group) -> Shape:
    """Shape of a state with one value for each of a parameter's."""
    return shape


def first_dimension(shape: Shape, group: Group) -> int:
    """Place of a parameter's rows in a state that has them in front."""
    return 0


class StateDecl(NamedTuple):
    """One state of a method: all that is to say of it, for every parameter.

    Args:
        signed: False promises values >= 0, such as a second moment's.
        shape: of the state, from a parameter's shape and group; None where that parameter has no such state.
        coded: whether the group's codec stores it, that of signed or that of unsigned states; else it is fp32.
        rows: the dimension of the state that is cut where a matrix is cut by rows; None, itself or what it returns:
            each process keeps all of it.
        average: it moves a little in each step, so its codes are rounded at random; else it is written once, or carried
            along, and rounded to the nearest.
        passing: it is there only between the backward passes of one accumulation window.
        option: of the group, which may name another codec for this state alone.
    """

    signed: bool
    shape: Callable[[Shape, Group], Shape | None] = as_parameter
    coded: bool = True
    rows: Callable[[Shape, Group], int | None] | None = first_dimension
    average: bool = True
    passing: bool = False
    option: str | None = None


class State(NamedTuple):
    """One state of one parameter: a codec that stores so many values.

    Args:
        codec: of its tensors.
        shape: of its values.
        cut: where `shape` has rows in front: whether shards divide them.
    """

    decl: StateDecl
    codec: StateCodec
    shape: Shape
    cut: bool = False

    def empty(self, name: str, device: torch.device | str) -> dict[str, Tensor]:
        """The tensors of this state under the names that an optimizer's state has for them, encoded zeros."""
        like = torch.zeros((), dtype=torch.float32, device=device).expand(self.shape)  # a shape: nothing is allocated
        return named(name, self.codec.init(like, signed=self.decl.signed))

    def nbytes(self) -> int:
        """Bytes of those tensors."""
        return self.codec.nbytes(self.shape.numel(), signed=self.decl.signed)


def whole_layout(
    decls: Mapping[str, StateDecl],
    codecs: tuple[StateCodec, StateCodec],
    shape: Shape,
    group: Group,
    *,
    small: bool = False,
) -> dict[str, State]:
    """The states of a parameter of `shape` as one process keeps them; of a `small` one all by `codecs`."""
    found: dict[str, State] = {}
    for name, decl in decls.items():
        own = decl.shape(shape, group)
        if own is not None:
            codec = codecs[0 if decl.signed else 1] if decl.coded else CODECS["fp32"]
            named_by = group.get(decl.option) if decl.option is not None and not small else None
            codec = codec if named_by is None else CODECS[named_by]
            found[name] = State(decl, codec, own)
    return found


def named(name: str, encoded: dict[str, Tensor]) -> dict[str, Tensor]:
    """A codec's tensors under the names that a state has for them."""
    return {name if k == "data" else f"{name}.{k}": v for k, v in encoded.items()}


def encoded_in(raw: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """The inverse of `named`: a codec's tensors of one state among all of a parameter."""
    found = {k: v for k, v in raw.items() if k.split(".")[0] == name and isinstance(v, Tensor)}
    return {k.removeprefix(name).removeprefix(".") or "data": v for k, v in found.items()}


def stream_key(*parts: object) -> int:
    """63 bits that depend on every part, the same on every machine and in every process."""
    text = "\x1f".join([str(part) for part in parts]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def is_finite(x: Tensor) -> Tensor:
    """Whether every value is finite: a bool on its device. One pass, and no temporary."""
    if not x.numel():
        return torch.ones((), dtype=torch.bool, device=x.device)
    low, high = torch.aminmax(x.detach())
    return (low > -torch.inf) & (high < torch.inf)  # False for NaN too
