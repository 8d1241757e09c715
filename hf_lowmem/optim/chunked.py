"""Long parameters a chunk at a time, where every value of an update needs that value alone.

Decoding, updating and encoding whole tensors makes temporaries of the size of the parameter in fp32, up to seven of
them: for an embedding of half a billion values that is more than its 4-bit states save. In chunks of `CHUNK` values
they are small. Blocks of codes lie whole in one chunk, and random numbers go by a value's place in the parameter, so a
chunk's result is the same bits as the whole's.

Kernels that make whole steps (optim/fused.py) have no such temporaries; this is for what they do not know: bf16 and
int4 states, and devices without Triton.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_lowmem.codecs import BlockCodec
from hf_lowmem.kernels.codecs.blocks import code_bytes
from hf_lowmem.kernels.step.reference import is_finite_gradient
from hf_lowmem.optim.guard import SkipCount, keep_or_take
from hf_lowmem.optim.method import Method
from hf_lowmem.optim.slot import Slot
from hf_lowmem.optim.state import COUNTS, Group

__all__ = ["CHUNK", "allocate", "can_chunk", "cut", "step_chunks"]

CHUNK = 1 << 24  # values; 64 MiB in fp32: small beside a model, and large beside the launch of a kernel


def can_chunk(p: Tensor, slot: Slot) -> bool:
    """Whether the parameter is long, and its weights, gradient and states lie in memory one value after the other."""
    return (
        p.numel() > CHUNK
        and slot.elementwise
        and not slot.sharded
        and p.grad is not None
        and _stored(p, slot).is_contiguous()
        and p.grad.is_contiguous()
        and all(CHUNK % s.codec.block == 0 for s in slot.states.values() if isinstance(s.codec, BlockCodec))
    )


def step_chunks(method: Method, p: Tensor, slot: Slot, group: Group, skips: SkipCount) -> None:
    """One step of a parameter that `can_chunk`; its step is counted already.

    A bad gradient leaves out all chunks, a result that is not finite its own.
    """
    allocate(p, slot)
    chunks = list(_chunks_of(p, slot))
    finite = torch.stack([is_finite_gradient(grad.to(torch.float32)) for _, grad, _ in chunks]).all()
    taken = finite
    if not (slot.syncs and not finite):
        for weights, grad, part in chunks:
            taken = taken & keep_or_take(method, weights, grad.to(torch.float32), finite, part, group)
    skips.add(taken, syncs=slot.syncs)


def _chunks_of(p: Tensor, slot: Slot) -> Iterator[tuple[Tensor, Tensor, Slot]]:
    """(weights, gradient, slot) of one chunk after the other; all are views, but a state's numbers are copies."""
    assert p.grad is not None
    flat, grad = _stored(p, slot).view(-1), p.grad.view(-1)
    for start in range(0, p.numel(), CHUNK):
        stop = min(start + CHUNK, p.numel())
        raw = {k: v if k in COUNTS else cut(k, v, slot, start, stop) for k, v in slot.raw.items()}
        yield flat[start:stop], grad[start:stop], slot.chunk(raw, start, stop)


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


def cut(key: str, tensor: Tensor, slot: Slot, start: int, stop: int) -> Tensor:
    """The entries of a state's tensor that belong to the values from `start` to `stop`."""
    name, _, kind = key.partition(".")
    if not kind:  # values themselves: fp32, bf16, or the correction beside a weight
        return tensor.view(-1)[start:stop]
    codec = slot.states[name].codec
    assert isinstance(codec, BlockCodec)
    if kind == "codes":
        return tensor.view(-1)[code_bytes(start, codec.bits) : code_bytes(stop, codec.bits)]
    return tensor[start // codec.block : -(-stop // codec.block)]
