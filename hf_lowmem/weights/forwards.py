"""Linear layers and embeddings whose weight is at rest: it is decoded for one product, and gone after it.

Each product is one autograd function, which saves its input and nothing of the weight. In backward the weight is
decoded again. So it does not matter by which way, or how often, a backward pass enters a layer, whether a checkpoint
runs it twice, or what a tier does to what is saved: nobody but these functions ever has the weight. The products are
torch's own, in torch's order, and the gradients are those of a plain layer with the decoded weight, bit for bit.

What they cost: a pass over the codes for each product, 3 bytes a weight, beside the 2 that the product itself reads.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

from hf_lowmem.patching import ForwardPatch, forwards_of
from hf_lowmem.weights.rest import AtRest, at_rest

__all__ = ["RestingForward", "check_writes", "eager", "forward_for", "is_conv1d"]


class Context(Protocol):
    """Place of what a product leaves for its backward."""

    kept: AtRest
    writes: int
    transposed: bool
    settings: tuple[int, int, bool]
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


# The names begin with those of torch's functions: tiers tell by a node's name whether it mixes values.
class LinearAtRest(torch.autograd.Function):
    """`x @ w.T + bias`; with `transposed`, of transformers' Conv1D, `x @ w + bias`."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, p: Tensor, bias: Tensor | None, kept: AtRest, transposed: bool) -> Tensor:
        ctx.kept, ctx.writes, ctx.transposed = kept, kept.writes[0], transposed
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        w = kept.decode().to(x.dtype)
        if not transposed:
            return F.linear(x, w, bias)
        out = torch.addmm(bias, x.reshape(-1, x.shape[-1]), w) if bias is not None else x @ w
        return out.view(*x.shape[:-1], w.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (x,) = grads, ctx.saved_tensors
        kept = ctx.kept
        check_writes(kept, ctx.writes)
        rows = g.reshape(-1, g.shape[-1])
        of_x = of_w = of_bias = None
        if ctx.needs_input_grad[0]:
            w = kept.decode().to(g.dtype)
            of_x = rows.mm(w.t() if ctx.transposed else w)
            of_x = of_x.view(*g.shape[:-1], of_x.shape[-1])
            del w
        if ctx.needs_input_grad[1]:
            inputs = x.reshape(-1, x.shape[-1])
            of_w = (inputs.t().mm(rows) if ctx.transposed else rows.t().mm(inputs)).to(kept.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0)
        return of_x, of_w, of_bias, None, None


def check_writes(kept: AtRest, expected: int) -> None:
    """Raise RuntimeError if a weight at rest has changed since it had been written so many times."""
    if kept.writes[0] != expected:
        raise RuntimeError(
            f"{kept.name}, at rest in int8, was updated after the forward pass whose gradient is asked for. With a "
            "step in backward a forward pass is followed by its own backward pass: add up losses before it."
        )


class EmbeddingAtRest(torch.autograd.Function):
    """Rows of a table; those that are looked up are decoded, and no others."""

    @staticmethod
    def forward(ctx: Context, ids: Tensor, p: Tensor, kept: AtRest, padding: int, by_frequency: bool) -> Tensor:
        ctx.settings = kept.shape[0], padding, by_frequency
        ctx.save_for_backward(ids)
        return kept.rows(ids.reshape(-1)).view(*ids.shape, kept.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        return None, torch.ops.aten.embedding_dense_backward(grads[0], ids, *ctx.settings), None, None, None


eager = torch.compiler.disable(reason="weights at rest in int8 are decoded by eager code")


class RestingForward(ForwardPatch):
    """A forward of a module whose `weight` is at rest. It stands below all other patches: it is the module's own."""

    def __call__(self, input: Tensor) -> Tensor:
        raise NotImplementedError

    def put(self) -> None:
        patches = list(forwards_of(self.module))
        if patches:
            self.inner, patches[-1].inner = patches[-1].inner, self
        else:
            super().put()

    def kept(self) -> tuple[Tensor, AtRest]:
        """The parameter, and what is kept of it."""
        p = self.module._parameters["weight"]
        found = at_rest(p)
        if found is None:
            raise RuntimeError(
                f"the weight of a {type(self.module).__name__} was at rest as codes, and has been replaced since, by "
                "load_state_dict(assign=True) or by hand. Load into it without assign=True, or replace it before the "
                "training (of a loop: before the optimizer is made)."
            )
        assert isinstance(p, Tensor)
        return p, found


class RestingLinear(RestingForward):
    """Forward of nn.Linear, and of transformers' Conv1D."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.transposed = is_conv1d(module)

    @eager
    def __call__(self, input: Tensor) -> Tensor:
        p, kept = self.kept()
        bias = self.module._parameters["bias"]
        kind = input.device.type
        if torch.is_autocast_enabled(kind) and input.is_floating_point() and input.dtype != torch.float64:
            wanted = torch.get_autocast_dtype(kind)
            return LinearAtRest.apply(
                input.to(wanted), p, bias if bias is None else bias.to(wanted), kept, self.transposed
            )
        return LinearAtRest.apply(input, p, bias, kept, self.transposed)


class RestingEmbedding(RestingForward):
    """Forward of nn.Embedding."""

    @eager
    def __call__(self, input: Tensor) -> Tensor:
        (p, kept), table = self.kept(), self.module
        assert isinstance(table, nn.Embedding)
        padding = -1 if table.padding_idx is None else table.padding_idx
        return EmbeddingAtRest.apply(input, p, kept, padding, table.scale_grad_by_freq)


def plain_type(module: nn.Module) -> type:
    """The class of a module without what FSDP2 makes of it."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, a linear layer whose weight is (inputs, outputs)."""
    kind = plain_type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def forward_for(module: nn.Module) -> type[RestingForward] | None:
    """The forward with which a module's `weight` can rest; None where the module may compute something else."""
    patches = list(forwards_of(module))
    theirs = patches[-1].inner if patches else vars(module).get("forward")
    if theirs is not None:  # somebody's else, such as accelerate's, which moves weights about
        return None
    if plain_type(module) is nn.Linear or is_conv1d(module):
        return RestingLinear
    if plain_type(module) is nn.Embedding and module.max_norm is None and not module.sparse:
        return RestingEmbedding
    return None
