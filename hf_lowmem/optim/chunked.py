"""Long parameters a part at a time, where an update of a part needs no more of the rest than can be found beforehand.

Decoding, updating and encoding whole tensors makes temporaries of the size of the parameter in fp32, up to seven of
them: for an embedding of half a billion values that is more than its 4-bit states save. In parts they are small. How a
parameter is cut follows from what the update of one of its values sees (`Method.reach`):

    "value"    chunks of `CHUNK` values, wherever they end
    "row"      blocks of whole rows, of about `PART` values
    "column"   the same, after a pass over the gradient that finds the norms of its columns (`Slot.columns`)
    "whole"    not at all

Blocks of codes lie whole in one part, and random numbers go by a value's place in the parameter, so a part's result is
the same bits as the whole's. All of the gradient is looked at before the first value changes.

Kernels that make whole steps (optim/fused.py) have no such temporaries; this is for what they do not know: rules of
rows and columns, bf16 and int4 states, and devices without Triton.
"""

import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from hf_lowmem.codecs import BlockCodec
from hf_lowmem.kernels.codecs.blocks import code_bytes
from hf_lowmem.kernels.step.reference import is_finite_gradient
from hf_lowmem.optim.guard import SkipCount, keep_or_take
from hf_lowmem.optim.method import Method
from hf_lowmem.optim.rows import column_norms
from hf_lowmem.optim.slot import Slot
from hf_lowmem.optim.state import COUNTS, Group

__all__ = [
    "CHUNK",
    "PART",
    "allocate",
    "can_chunk",
    "can_cut",
    "each_of",
    "has_rows",
    "rows_at_once",
    "rows_of",
    "step_chunks",
    "unit_of",
    "values_of_part",
]

CHUNK = 1 << 24  # values; 64 MiB in fp32: small beside a model, and large beside the launch of a kernel
PART = 1 << 22  # values of whole rows; no kernel makes their step, and its temporaries are several times 16 MiB

Part = TypeVar("Part")


def can_chunk(p: Tensor, slot: Slot) -> bool:
    """Whether the parameter is long, and its weights, gradient and states lie in memory so that they can be cut."""
    if slot.sharded or p.grad is None or not (_stored(p, slot).is_contiguous() and p.grad.is_contiguous()):
        return False
    if slot.elementwise:
        return p.numel() > CHUNK and can_cut(p, slot)
    return p.numel() > PART and slot.reach != "whole" and p.ndim >= 2 and has_rows(p, slot)


def can_cut(p: Tensor, slot: Slot) -> bool:
    """Whether the values of a parameter with an elementwise update, and their states, can be cut after each `CHUNK`."""
    blocks = [s.codec.block for s in slot.states.values() if isinstance(s.codec, BlockCodec)]
    return _stored(p, slot).is_contiguous() and all(CHUNK % block == 0 for block in blocks)


def has_rows(p: Tensor, slot: Slot) -> bool:
    """Whether every state of the parameter can be cut by its rows."""
    return all(
        s.shape == p.shape if isinstance(s.codec, BlockCodec) else s.shape[:1] == p.shape[:1]
        for s in slot.states.values()
    )


def unit_of(p: Tensor, slot: Slot) -> int:
    """Rows of which a block must have a multiple, or all that are left: so that codes are cut at whole blocks, and the
    pairs of neighbours, which are rounded by the halves of one word, are whole."""
    blocks = [s.codec.block for s in slot.states.values() if isinstance(s.codec, BlockCodec)]
    whole = math.lcm(2, *blocks)
    return whole // math.gcd(whole, p.shape[1:].numel())


def rows_at_once(p: Tensor, slot: Slot) -> int:
    """Rows of a block of about `PART` values."""
    unit = unit_of(p, slot)
    return max(1, PART // p.shape[1:].numel() // unit) * unit


def step_chunks(method: Method, p: Tensor, slot: Slot, group: Group, skips: SkipCount) -> None:
    """One step of a parameter that `can_chunk`; its step is counted already.

    A bad gradient leaves out all parts, a result that is not finite its own.
    """
    assert p.grad is not None
    allocate(p, slot)
    cuts = list((_chunks_of if slot.elementwise else _blocks_of)(p, slot))
    grads = p.grad.view(-1) if slot.elementwise else p.grad
    finite = torch.stack([is_finite_gradient(grads[first:last].to(torch.float32)) for first, last in cuts]).all()
    taken = finite
    if not (slot.syncs and not finite):
        columns = column_norms(p.grad) if slot.reach == "column" else None
        for first, last in each_of(cuts):
            weights, part = (values_of_part if slot.elementwise else rows_of)(p, slot, first, last)
            part.columns = columns
            taken = taken & keep_or_take(method, weights, grads[first:last].to(torch.float32), finite, part, group)
    skips.add(taken, syncs=slot.syncs)


def each_of(parts: Sequence[Part]) -> Sequence[Part]:
    """The parts of a parameter that are updated, one after the other: all of them. A plan, in which there are sizes and
    no values, has a few in the place of those that are alike (hf_lowmem/planner/step.py)."""
    return parts


def _chunks_of(p: Tensor, slot: Slot) -> Iterator[tuple[int, int]]:
    """First and last value of one chunk after the other."""
    for start in range(0, p.numel(), CHUNK):
        yield start, min(start + CHUNK, p.numel())


def values_of_part(p: Tensor, slot: Slot, start: int, stop: int) -> tuple[Tensor, Slot]:
    """The weights from `start` to `stop`, flat, and the slot of their state; both are views."""
    raw = {k: v if k in COUNTS else _cut(k, v, slot, start, stop) for k, v in slot.raw.items()}
    return _stored(p, slot).view(-1)[start:stop], slot.chunk(raw, start, stop)


def _blocks_of(p: Tensor, slot: Slot) -> Iterator[tuple[int, int]]:
    """First and last row of one block of rows after the other."""
    each = rows_at_once(p, slot)
    for first in range(0, len(p), each):
        yield first, min(first + each, len(p))


def rows_of(p: Tensor, slot: Slot, first: int, last: int) -> tuple[Tensor, Slot]:
    """The weights of some rows, and the slot of their state; both are views."""
    values = p.shape[1:].numel()
    start, stop = first * values, last * values
    raw = {
        k: v if k in COUNTS else _cut(k, v, slot, start, stop) if "." in k else v[first:last]
        for k, v in slot.raw.items()
    }
    return _stored(p, slot)[first:last], slot.chunk(raw, start, stop, rows=last - first)


def _stored(p: Tensor, slot: Slot) -> Tensor:
    """Tensor in which the weights of a parameter lie: itself, or the codes of one that is at rest."""
    return p if slot.rest is None else slot.rest.codes.view(p.shape)


def allocate(p: Tensor, slot: Slot) -> None:
    """Make all that the state of `p` has, as the whole parameter's: nothing that is made for a part of it is kept."""
    if slot.store.corrected:
        slot.correction(p)
    if slot.draws:
        _ = slot.key
    for name in slot.states:
        slot.tensors(name)


def _cut(key: str, tensor: Tensor, slot: Slot, start: int, stop: int) -> Tensor:
    """The entries of a state's tensor that belong to the values from `start` to `stop`."""
    name, _, kind = key.partition(".")
    if not kind:  # values themselves: fp32, bf16, or the correction beside a weight
        return tensor.view(-1)[start:stop]
    codec = slot.states[name].codec
    assert isinstance(codec, BlockCodec)
    if kind == "codes":
        return tensor.view(-1)[code_bytes(start, codec.bits) : code_bytes(stop, codec.bits)]
    return tensor[start // codec.block : -(-stop // codec.block)]
