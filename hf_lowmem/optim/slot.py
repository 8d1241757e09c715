"""A slot: what is decided once for a parameter, and its state as a method sees it.

A step asks many questions of a parameter whose answers never change: which codec stores its moments and in which
shapes, whether the low-rank rule applies, how its weights are written, where the rest of a shard is. A `Slot` has the
answers as plain attributes. The optimizer keeps one for each parameter and makes it anew when something that they
depend on has changed: FSDP2 puts another parameter in its place, a group's structural option is set, a checkpoint is
loaded. A slot holds no parameter, so that none is kept alive by it; nor is it ever saved.

Methods get fp32 tensors by name (`load`, `save`), whatever codec stores them, and numbers (`step`, `key`).
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lowmem.codecs import BlockCodec, Dither, codec_pair
from hf_lowmem.distributed import WHOLE, Whole, local
from hf_lowmem.kernels.codecs.dither import seed_of
from hf_lowmem.kernels.codecs.reference import CODECS
from hf_lowmem.optim.names import stream_name
from hf_lowmem.optim.state import (
    CORRECTION,
    COUNT_BYTES,
    OVERLAP,
    Counted,
    Group,
    Reach,
    State,
    StateDecl,
    count,
    encoded_in,
    is_finite,
    stream_key,
    whole_layout,
)
from hf_lowmem.weights import Weights, at_rest, store_for

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
KNOWN = {"fp32", *CODECS}  # codecs that kernels read and write

# Decided from a parameter's whole size, never from a shard's: one model has one layout on any number of devices.
SMALLEST_COMPRESSED = 4096


def reads_are_free(device: torch.device) -> bool:
    """Whether reading a number from a device costs nothing, so that a bad gradient can simply be skipped."""
    return device.type == "cpu"


def is_low_rank(shape: torch.Size, rank: int | None) -> bool:
    """Whether a parameter of this shape takes the low-rank rule: a matrix, or a batch, that the rank makes smaller."""
    return rank is not None and len(shape) in (2, 3) and rank < min(shape[-2:])


class Slot:
    """One parameter's state, and the decisions that are taken once for it.

    Args:
        p: the parameter; only read here.
        group: its parameter group.
        decls: the method's states.
        reach: how much of the parameter the update of one value sees.
        rule: name of the rule that it takes.
        groups: all of the optimizer's.

    Attributes:
        values: how many of the parameter's are on this process.
        states: those that the parameter has, as they lie on this process.
        whole: the same as one process would keep them all.
        coded: whether any of them whose codec is the group's is stored in fewer bits than fp32.
        low_rank: whether the low-rank rule applies.
        elementwise: whether the update of a value sees that value alone.
        fusable: whether the kernels of optim/fused.py know such weights and states.
        store: how its weights are stored.
        rest: what is kept of a weight that is at rest in int8.
        shards: where the rest of the parameter is; of a batch of matrices that is cut, each is whole.
        cut: whether the rows of one matrix, or of a vector, lie on several processes.
        syncs: whether reading a number from its device is free.
        draws: whether updates draw random numbers, so that the state has a `key`.
        finite: of what an update computes and saves, whether it is finite; None: nobody asks.
        facts: all that these decisions depend on, for who wants to know whether they still hold.
        start: of a part of a parameter, its first value's place in the whole.
        is_part: whether it is the slot of a part.
        columns: of a part, where its reach is "column", the norms of the whole gradient's columns, (1, columns).
    """

    sharded = False
    cut = False
    is_part = False
    columns: Tensor | None = None
    shards: Whole = WHOLE

    def __init__(
        self,
        p: Tensor,
        group: Group,
        decls: Mapping[str, StateDecl],
        *,
        reach: Reach = "whole",
        rule: str = "",
        groups: Sequence[Group] = (),
    ) -> None:
        self.shape, self.device, self.values = p.shape, p.device, local(p).numel()
        small = p.numel() < SMALLEST_COMPRESSED
        self.codecs = codec_pair("fp32" if small else group["state"])
        self.low_rank = is_low_rank(p.shape, group.get("rank"))
        self.reach, self.rule = reach, rule
        self.elementwise = reach == "value"
        self.rest = at_rest(p)
        self.store = store_for(group["weights"], p.dtype, resting=self.rest is not None)
        self.syncs = reads_are_free(p.device)
        self.whole = whole_layout(decls, self.codecs, p.shape, group, small=small)
        self.states = self._states(p, group)
        self.codec_names = tuple(state.codec.name for state in self.states.values())
        self.coded = any(s.codec.name != "fp32" for s in self.states.values() if s.decl.option is None)
        self.fusable = (
            not (self.low_rank or self.sharded or self.rest)
            and p.dtype in FLOATS
            and KNOWN.issuperset(self.codec_names)
        )
        # As one process would: shards of short rows are fp32 and round nothing, but torch loads a state name by name.
        self.dithers = any(s.decl.average and s.codec.name != "fp32" for s in self.whole.values())
        projects_at_random = self.low_rank and group.get("projection") not in (None, "svd")
        self.draws = self.dithers or projects_at_random or self.store.draws
        self.finite: list[Tensor] | None = None
        self.start = 0
        self.group = group
        self.facts: tuple[Any, ...] = ()
        self._ident, self._groups = id(p), groups
        self.raw: dict[str, Any] = {}
        self._pair: tuple[int, int] | None = None  # of steps: they share a key
        self._pair_key = 0
        self._counted, self._drawn = Counted("step"), Counted("key")
        self.open({})

    def _states(self, p: Tensor, group: Group) -> dict[str, State]:
        return self.whole

    def open(self, raw: dict[str, Any]) -> None:
        """Begin an update, or a look, at the state `raw`; numbers are read from it again."""
        if raw is not self.raw:
            self.raw = raw
            self._keys: dict[str, dict[str, str]] = {}  # of a state's tensors: names in `raw`, in a kernel's order
        self._step: int | None = None
        self._key: int | None = None
        self._state_seed: int | None = None

    def chunk(self, raw: dict[str, Any], start: int, stop: int, rows: int | None = None) -> "Slot":
        """The slot of the values from `start` to `stop`, whose state is `raw`; `rows`: they are so many whole rows."""
        part = copy.copy(self)
        part.open(raw)
        part.start, part.is_part = start, True
        part.rest = self.rest and self.rest.part(start, stop, rows)
        shapes = {k: [stop - start] if rows is None else [rows, *s.shape[1:]] for k, s in self.states.items()}
        part.states = {k: s._replace(shape=torch.Size(shapes[k])) for k, s in self.states.items()}
        return part

    def nbytes(self) -> int:
        """Bytes of the tensors that the state takes on this process; nothing is allocated."""
        states = sum(state.nbytes() for state in self.states.values() if not state.decl.passing)
        counts = 1 + self.draws + self.sharded + 2 * (OVERLAP in self.states)
        return states + self.store.nbytes(self.values) + COUNT_BYTES * counts

    @property
    def step(self) -> int:
        """Number of updates that the parameter has had; during an update, that one included."""
        if self._step is None:
            self._step = self._counted.read(self.raw)
        return self._step

    def count_step(self) -> None:
        """Count one update more, in the state."""
        if not self.is_part:  # of which the whole is counted
            self._step, self._state_seed = self._counted.one_more(self.raw), None

    @property
    def key(self) -> int:
        """Start of the parameter's random streams; kept in the state, so that a resumed run draws the same numbers."""
        if self._key is None:
            if "key" not in self.raw:
                self.raw["key"] = count(stream_start(self._ident, self.group, self._groups or [self.group]))
            self._key = self._drawn.read(self.raw)
        return self._key

    @property
    def state_seed(self) -> int:
        """Seed of this step's random rounding of the states."""
        if self._state_seed is None:
            pair = self.key, self.step // 2
            if pair != self._pair:
                self._pair, self._pair_key = pair, stream_key(pair[0], "states", pair[1])
            self._state_seed = seed_of(self._pair_key, self.step)
        return self._state_seed

    @property
    def weight_seed(self) -> int:
        """Seed of this step's random rounding of the weights. Which of its numbers a value takes is its place."""
        return stream_key(self.key, "weights", self.step)

    def first(self, name: str | None = None) -> int:
        """Place in the whole of the first value that is here, of a state or of the weights."""
        return self.start

    def load(self, name: str) -> Tensor:
        """The state `name` as an fp32 tensor; zeros, now allocated, the first time.

        A state that is stored as fp32 is handed out itself, to be changed in place: a copy would cost a pass over
        memory each way, and a temporary.
        """
        encoded = self._ensure(name)
        data = encoded.get("data")
        if data is not None and data.dtype == torch.float32:
            return data
        state = self.states[name]
        return state.codec.decode(encoded, state.shape)

    def save(self, name: str, value: Tensor) -> None:
        """Encode `value` over the state `name`, which was loaded before."""
        encoded = self._encoded(name)
        assert encoded is not None, f"state {name!r} is saved before it was loaded"
        if self.finite is not None:
            self.judge(value)
        if encoded.get("data") is value:
            return
        decl, codec, *_ = self.states[name]
        dither = None
        if decl.average and codec.name != "fp32":
            dither = Dither(self.state_seed, self.first(name))
        codec.encode_(encoded, value, dither)

    def judge(self, value: Tensor) -> Tensor:
        """Whether a result is finite, which is noted: an update with one that is not is taken back."""
        flag = is_finite(value)
        if self.finite is not None:
            self.finite.append(flag)
        return flag

    def tensors(self, name: str) -> list[Tensor]:
        """The tensors of the state `name` as a kernel takes them: its values, or its codes and scalars."""
        keys = self._keys.get(name)
        return list(self._ensure(name).values()) if keys is None else [self.raw[key] for key in keys.values()]

    def weights(self, p: Tensor, finite: Tensor, *, keep: bool) -> Weights:
        """The parameter's weights, or those of a chunk `p` of it, for one update; the arguments as in `Weights`."""
        correction = self.correction(local(p)) if self.store.corrected else None
        if not self.store.draws:
            return Weights(p, finite, keep=keep, correction=correction)
        return Weights(
            p, finite, keep=keep, correction=correction, seed=self.weight_seed, first=self.first(), rest=self.rest
        )

    def correction(self, here: Tensor) -> Tensor:
        """The int8 beside a bf16 weight that is stored with 24 bits. `here`: what of the weight is on this process."""
        if CORRECTION not in self.raw:
            self.raw[CORRECTION] = torch.zeros_like(here, dtype=torch.int8)
        return self.raw[CORRECTION]

    def _encoded(self, name: str) -> dict[str, Tensor] | None:
        if name in self.raw:
            return {"data": self.raw[name]}
        if name not in self._keys:
            codec, found = self.states[name].codec, encoded_in(self.raw, name)
            if not found:
                return None
            if isinstance(codec, BlockCodec):
                order = [id(t) for t in (found["codes"], *codec.scalars_of(found))]
                found = dict(sorted(found.items(), key=lambda item: order.index(id(item[1]))))
            self._keys[name] = {k: f"{name}.{k}" for k in found}
        return {k: self.raw[key] for k, key in self._keys[name].items()}

    def _ensure(self, name: str) -> dict[str, Tensor]:
        encoded = self._encoded(name)
        if encoded is None:
            self._allocate(name)
            encoded = self._encoded(name)
            assert encoded is not None
        return encoded

    def _allocate(self, name: str) -> None:
        self.raw.update(self.states[name].empty(name, self.device))


def stream_start(ident: int, group: Group, groups: Sequence[Group]) -> int:
    """Start of a parameter's random stream, 63 bits: a hash of the seed and its name (without names: its place).

    Args:
        ident: `id` of the parameter.
        group: its group, one of `groups`.
    """
    place, p = next((i, p) for i, p in enumerate(group["params"]) if id(p) == ident)
    names = group.get("param_names")
    if not names:
        return stream_key(group["seed"], f"{tuple(p.shape)}#{place}")
    every = [name for g in groups for name in g["param_names"]]  # all groups have names, or none
    return stream_key(group["seed"], stream_name(names[place], every))
