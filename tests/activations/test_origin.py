"""A bias on attention's scores is kept as it is, whatever its shape: it holds a mask, or is no activation at all.

The attention here saves its bias for the backward pass, as torch's memory-efficient CUDA kernel does.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem.activations import convert
from tests.activations.test_hunt import error_of

TOKENS, HEADS = 40, 4
LOWEST = torch.finfo(torch.float32).min


class Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v, bias)
        return (q @ k.mT + bias).softmax(-1) @ v

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        q, k, v, bias = ctx.saved_tensors
        p = (q @ k.mT + bias).softmax(-1)
        dp = g @ v.mT
        ds = p * (dp - (dp * p).sum(-1, keepdim=True))
        return ds @ k, ds.mT @ q, p.mT @ g, ds.sum(0, keepdim=True) if len(bias) == 1 else ds


def added(m: Any, x: Tensor, table: Tensor) -> Tensor:
    return table + torch.triu(torch.full((TOKENS, TOKENS), LOWEST), 1)


def infinite(m: Any, x: Tensor, table: Tensor) -> Tensor:
    return table + torch.triu(torch.full((TOKENS, TOKENS), -torch.inf), 1)


def filled(m: Any, x: Tensor, table: Tensor) -> Tensor:
    return table.masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), LOWEST)


def chosen(m: Any, x: Tensor, table: Tensor) -> Tensor:
    return torch.where(torch.ones(TOKENS, TOKENS).tril().bool(), table, LOWEST)


def scaled(m: Any, x: Tensor, table: Tensor) -> Tensor:
    return added(m, x, table).clamp(min=LOWEST / 4).mul(2.0).contiguous()


def unmasked(m: Any, x: Tensor, table: Tensor) -> Tensor:
    return table


def by_a_small_network(m: Any, x: Tensor, table: Tensor) -> Tensor:
    """As in Swin v2: no activation, though linears have made it."""
    places = torch.linspace(-1, 1, TOKENS)[:, None, None] - torch.linspace(-1, 1, TOKENS)[None, :, None]
    return m.up(m.down(places.expand(-1, -1, 64)).relu())[..., :HEADS].permute(2, 0, 1)[None]


def gated_by_the_tokens(m: Any, x: Tensor, table: Tensor) -> Tensor:
    """As in WavLM: an activation, with a mask in it."""
    return added(m, x, table * m.q(x)[..., :HEADS].mT[..., None].sigmoid())


class Attention(nn.Module):
    def __init__(self, bias: Callable[..., Tensor]) -> None:
        super().__init__()
        self.num_heads, self.bias = HEADS, bias
        self.q, self.k, self.v, self.o, self.down, self.up = (nn.Linear(64, 64) for _ in range(6))
        self.rel = nn.Embedding(TOKENS, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        places = (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).clamp(min=0)
        bias = self.bias(self, x, self.rel(places).permute(2, 0, 1)[None])
        q, k, v = (f(x).view(len(x), TOKENS, HEADS, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(Attend.apply(q / 4, k, v, bias).transpose(1, 2).flatten(2))  # type: ignore[union-attr]


class WithSoftmax(nn.Module):
    """A softmax that is a module, whose input is the masked scores."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.softmax = HEADS, nn.Softmax(-1)
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(len(x), TOKENS, HEADS, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.mT / 4 + torch.triu(torch.full((TOKENS, TOKENS), LOWEST), 1)
        return self.o((self.softmax(scores) @ v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(64), attention

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x))


class Net(nn.Module):
    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer(make()), Layer(make())])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def gradients(model: nn.Module, rows: int, trained_input: bool) -> dict[str, Tensor]:
    x = torch.randn(rows, TOKENS, 64, generator=torch.Generator().manual_seed(1)).requires_grad_(trained_input)
    model(x * 1.0).square().mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


BIASES = [added, infinite, filled, chosen, scaled, unmasked, by_a_small_network, gated_by_the_tokens]


@pytest.mark.parametrize("trained_input", [True, False])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("bias", [*BIASES, None], ids=lambda f: f.__name__ if f else "softmax")
def test_a_bias_is_never_coded(bias: Any, rows: int, trained_input: bool) -> None:
    """The bound is int8's and E4M3's on the rest: in a coded bias whole groups would be lost."""
    model = Net(WithSoftmax if bias is None else lambda: Attention(bias))
    ours = copy.deepcopy(model)
    convert(ours, "fp8")
    found, truth = gradients(ours, rows, trained_input), gradients(model, rows, trained_input)
    assert all(g.isfinite().all() for g in found.values())
    assert error_of(found, truth) < 0.1
