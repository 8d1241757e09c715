"""One parameter's state as a method and as a fused kernel see it, and where random streams start.

The whole numbers of a state, `step` and `key`, are tensors without a dimension on the CPU, as torch's `step` is: a
distributed checkpoint is loaded into a state's tensors in place, and a Python number has no place. Reading one asks no
accelerator. They are real tensors also in a step on fake ones, which are planned with: a method branches on them.
"""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from hf_lowmem.codecs import BlockCodec, Dither, StateCodec
from hf_lowmem.distributed import WHOLE, Whole
from hf_lowmem.kernels.codecs.dither import seed_of

# The sum of projected gradients, between the backward passes of one window.
WINDOW = "window"

# The int8 beside a bf16 weight that is stored with 24 bits.
CORRECTION = "correction"

# In the state of a sharded parameter: its tensors are laid out by rows; see hf_lowmem/optim/sharded.py.
BY_ROWS = "by_rows"

# The whole numbers of a state.
COUNTS = ("step", "key", BY_ROWS)
COUNT_BYTES = 8


def count(value: int) -> Tensor:
    """A whole number of a state."""
    return _really(torch.tensor, value, dtype=torch.int64, device="cpu")


def number(value: Tensor | int) -> int:
    """What `count` made. Version 0.1.0 had plain numbers, and whoever moves a state moves these along."""
    return int(_really(value.item)) if isinstance(value, Tensor) else value


def count_step(raw: dict[str, Any]) -> int:
    """Count one update more, in place; how many there have been."""
    step = raw.get("step")
    if not isinstance(step, Tensor) or step.device.type != "cpu":
        raw["step"] = step = count(0 if step is None else number(step))
    _really(step.add_, 1)
    return number(step)


def _really(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `function` does outside of every dispatch mode; asking whether there is one takes no time."""
    if not _get_current_dispatch_mode_stack():
        return function(*args, **kwargs)
    with _disable_current_modes():
        return function(*args, **kwargs)


def values_of(raw: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state that an update changes: all but its whole numbers."""
    return {k: v for k, v in raw.items() if isinstance(v, Tensor) and k not in COUNTS}


class StateDecl(NamedTuple):
    """One state of a method. `signed=False` promises values >= 0, such as a second moment.

    `replicated`: each process keeps the whole of it where a matrix is cut by rows. `average`: it moves a little in each
    step, so its codes are rounded at random; else it is written once, or carried along, and to the nearest.
    """

    signed: bool
    replicated: bool = False
    average: bool = True


class ParamState:
    """One parameter's state as its method sees it: fp32 tensors by name, whatever codec stores them.

    Of a sharded parameter a method sees the part that is here; `shards` sums over the others, and `rows`, of a matrix
    that is cut, is how many rows the states loaded next have on all processes together.
    """

    shards: Whole = WHOLE
    rows: int | None = None
    start = 0  # of a part of a parameter, its first value's place in the whole

    def __init__(
        self,
        raw: dict[str, Any],
        codecs: tuple[StateCodec, StateCodec],
        decls: dict[str, StateDecl],
        make_key: Callable[[], int],
        waits: bool,
    ) -> None:
        self.raw = raw
        self.codecs = codecs
        self.decls = decls
        self.make_key = make_key
        # Whether a method may ask for a number on the device: on a CPU the answer costs nothing.
        self.waits = waits
        # Of what an update computes and stores, whether it is finite; None: nobody asks.
        self.finite: list[Tensor] | None = None

    @property
    def step(self) -> int:
        """How many updates this parameter has had, this one included."""
        return number(self.raw["step"])

    @property
    def key(self) -> int:
        """Start of this parameter's random streams; kept in the state, so that a resumed run draws the same numbers."""
        if "key" not in self.raw:
            self.raw["key"] = count(self.make_key())
        return number(self.raw["key"])

    @property
    def state_seed(self) -> int:
        """Seed of this step's random rounding of the states."""
        step = self.step if "step" in self.raw else 0
        return seed_of(stream_key(self.key, "states", step // 2), step)

    def first(self, value: Tensor) -> int:
        """Place of the first value of a state, of which this may be a part, in the whole."""
        return self.start

    def _codec(self, name: str) -> StateCodec:
        return self.codecs[0 if self.decls[name].signed else 1]

    def _encoded(self, name: str) -> dict[str, Tensor] | None:
        if name in self.raw:
            return {"data": self.raw[name]}
        prefix = name + "."
        return {k.removeprefix(prefix): v for k, v in self.raw.items() if k.startswith(prefix)} or None

    def _ensure(self, name: str, like: Tensor) -> dict[str, Tensor]:
        encoded = self._encoded(name)
        if encoded is None:
            self._allocate(name, like)
            encoded = self._encoded(name)
            assert encoded is not None
        return encoded

    def _allocate(self, name: str, like: Tensor) -> None:
        self.raw.update(named(name, self._codec(name).init(like, signed=self.decls[name].signed)))

    def load(self, name: str, like: Tensor) -> Tensor:
        """The state `name` as an fp32 tensor of `like`'s shape; zeros, now allocated, the first time.

        A state that is stored as fp32 is handed out itself, to be changed in place: a copy would cost a pass over
        memory each way, and a temporary.
        """
        encoded = self._ensure(name, like)
        data = encoded.get("data")
        if data is not None and data.dtype == torch.float32:
            return data
        return self._codec(name).decode(encoded, like.shape)

    def store(self, name: str, value: Tensor) -> None:
        """Encode `value` over the state `name`."""
        encoded = self._encoded(name)
        assert encoded is not None, f"state {name!r} is stored before it was loaded"
        self.judge(value)
        if encoded.get("data") is value:
            return
        codec, dither = self._codec(name), None
        if self.decls[name].average and codec.name != "fp32":
            dither = Dither(self.state_seed, self.first(value))
        codec.encode_(encoded, value, dither)

    def judge(self, value: Tensor) -> None:
        """Note whether a result is finite: an update with one that is not is taken back."""
        if self.finite is not None:
            self.finite.append(is_finite(value))

    def parts(self, name: str, like: Tensor) -> list[Tensor]:
        """The tensors of the state `name` as a kernel takes them: its values, or its codes and scalars."""
        encoded, codec = self._ensure(name, like), self._codec(name)
        if isinstance(codec, BlockCodec):
            return [encoded["codes"], *codec.scalars_of(encoded)]
        return [encoded["data"]]

    def tensor(self, name: str, init: Callable[[], Tensor]) -> Tensor:
        """A small uncompressed state, in place."""
        if name not in self.raw:
            self.raw[name] = init()
        return self.raw[name]


def named(name: str, encoded: dict[str, Tensor]) -> dict[str, Tensor]:
    """A codec's tensors under the names that a state has for them."""
    return {name if k == "data" else f"{name}.{k}": v for k, v in encoded.items()}


def stream_key(*parts: object) -> int:
    """63 bits that depend on every part, the same on every machine and in every process."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def is_finite(x: Tensor) -> Tensor:
    """Whether every value is finite: a bool on its device. One pass, and no temporary."""
    if not x.numel():
        return torch.ones((), dtype=torch.bool, device=x.device)
    low, high = torch.aminmax(x.detach())
    return (low > -torch.inf) & (high < torch.inf)  # False for NaN too
