"""Long parameters in parts, where every value of an update needs that value alone.

Decoding, updating and encoding whole tensors makes temporaries of the size of the parameter in fp32, up to seven of
them: for an embedding of half a billion values that is more than its 4-bit states save. In parts of `PART` values they
are small. Blocks of codes lie whole in one part, and random numbers are those of a value's place in the whole, so a
part's result is the same bits as the whole's.

Kernels that make whole steps (optim/fused.py) have no such temporaries; this is for what they do not know: bf16 and
int4 states, and devices without Triton.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_lowmem.codecs import BlockCodec, StateCodec
from hf_lowmem.kernels.codecs.blocks import code_bytes
from hf_lowmem.kernels.step.reference import is_sound
from hf_lowmem.optim.state import CORRECTION, ParamState

if TYPE_CHECKING:
    from hf_lowmem.optim.base import LowMemOptimizer

__all__ = ["PART", "can_part", "step_parts"]

PART = 1 << 24  # values; 64 MiB in fp32: small beside a model, and large beside the launch of a kernel


def can_part(p: Tensor, codecs: tuple[StateCodec, StateCodec]) -> bool:
    """Whether the parameter is long, and its weights, gradient and states lie in memory one value after the other."""
    return (
        p.numel() > PART
        and p.grad is not None
        and p.is_contiguous()
        and p.grad.is_contiguous()
        and all(PART % codec.block == 0 for codec in codecs if isinstance(codec, BlockCodec))
    )


def step_parts(optimizer: "LowMemOptimizer", p: Tensor, group: dict[str, Any]) -> None:
    """One step of a parameter that `can_part`; its step is counted already."""
    state, store = optimizer._state_of(p, group), optimizer.store_of(p, group)
    if store == "bf16_ecc":
        state.tensor(CORRECTION, lambda: torch.zeros_like(p, dtype=torch.int8))
    if store != "keep" or any(codec.name != "fp32" for codec in state.codecs):
        state.raw["key"] = state.key  # parts have copies of the state's numbers, which are not kept
    parts = list(_parts_of(p, state, optimizer.state_shapes(p.shape, group)))
    sound = torch.stack([is_sound(grad.to(torch.float32)) for _, grad, _ in parts]).all()
    waits = optimizer._waits_for_the_device(p)
    if waits and not sound:
        return
    for weights, grad, part in parts:
        if waits:
            optimizer._apply(weights, grad.to(torch.float32), sound, part, group)
        else:
            optimizer._apply_where(sound, weights, grad.to(torch.float32), part, group)


def _parts_of(p: Tensor, state: ParamState, names: Iterable[str]) -> Iterator[tuple[Tensor, Tensor, ParamState]]:
    """(weights, gradient, state) of one part after the other; all are views, but a state's numbers are copies.

    The tensors of the states `names` are allocated first, as the whole parameter's.
    """
    assert p.grad is not None
    for name in names:
        state._ensure(name, p)
    flat, grad = p.view(-1), p.grad.view(-1)
    for start in range(0, p.numel(), PART):
        stop = min(start + PART, p.numel())
        raw = {k: _cut(k, v, state, start, stop) if isinstance(v, Tensor) else v for k, v in state.raw.items()}
        part = ParamState(raw, state.codecs, state.decls, state.make_key, state.waits)
        part.place, part.start = state.place, start
        yield flat[start:stop], grad[start:stop], part


def _cut(key: str, tensor: Tensor, state: ParamState, start: int, stop: int) -> Tensor:
    """The entries of a state's tensor that belong to the values from `start` to `stop`."""
    name, _, kind = key.partition(".")
    if not kind:  # values themselves: fp32, bf16, or the correction beside a weight
        assert name == CORRECTION or name in state.decls, name
        return tensor.view(-1)[start:stop]
    codec = state._codec(name)
    assert isinstance(codec, BlockCodec)
    if kind == "codes":
        return tensor.view(-1)[code_bytes(start, codec.bits) : code_bytes(stop, codec.bits)]
    return tensor[start // codec.block : -(-stop // codec.block)]
