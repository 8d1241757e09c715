"""A streamed layer as one node of autograd, whose inputs are the activations and the layer's weights."""

from typing import Protocol

import torch
from torch import Tensor

from hf_lowmem.activations.aside import check_first_derivative
from hf_lowmem.activations.formats import compress
from hf_lowmem.activations.host import HostStore, Kept
from hf_lowmem.activations.streaming.call import Call
from hf_lowmem.activations.streaming.chains import Chain, Start

__all__ = ["Node"]


class Context(Protocol):
    """Place of what a layer's call leaves for its backward.

    place: of the call in its chain.
    """

    call: Call
    chain: Chain
    place: int
    kept: Kept | None
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class Node(torch.autograd.Function):
    """(call, chain, what its first call has kept, where this one keeps its input, activations, *weights) → output."""

    @staticmethod
    def forward(
        ctx: Context,
        call: Call,
        chain: Chain,
        start: Start | None,
        store: HostStore | None,
        hidden: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        out = call.first(hidden)
        ctx.call, ctx.chain, ctx.place = call, chain, len(chain.calls) - 1
        if start is None:
            parts = compress(hidden, call.fmt, seed=call.seed)
            start = parts if store is None else store.put(parts)
            chain.started(start)
        # Each node of a chain saves the same tensors, as of a graph there may be one end only that is gone through.
        ctx.kept = start if isinstance(start, Kept) else None
        ctx.save_for_backward(*(() if isinstance(start, Kept) else start))
        return out

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative(ctx.call.what, "it runs by chunks, each with a graph of its own that is gone")
        kept = ctx.kept
        parts = ctx.chain.input_of(ctx.place, lambda: ctx.saved_tensors if kept is None else kept.get())
        return None, None, None, None, *ctx.call.second(parts, grads[0], ctx.needs_input_grad[4])
