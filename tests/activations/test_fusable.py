"""Which norms and MLPs a kernel may stand in for: by what they compute, and only if that is all of it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_lowmem.activations import convert
from hf_lowmem.activations.blocks import GatedMLP, Norm
from hf_lowmem.activations.fusable import Gated, RMSNorm, gated_of, rmsnorm_of
from tests.activations.models import build

LLAMA_MLP = Gated("gate_proj", "up_proj", "act_fn", "down_proj", "silu")
GEMMA_MLP = Gated("gate_proj", "up_proj", "act_fn", "down_proj", "gelu_tanh")
PHI3_MLP = Gated("gate_up_proj", "", "activation_fn", "down_proj", "silu")
LLAMA_NORM, GEMMA_NORM = RMSNorm("weight", 1e-6, False, True), RMSNorm("weight", 1e-6, True, False)
EXPECTED = {
    "llama": (LLAMA_NORM, LLAMA_MLP),
    "qwen3": (LLAMA_NORM, LLAMA_MLP),
    "mistral": (LLAMA_NORM, LLAMA_MLP),
    "gemma": (GEMMA_NORM, GEMMA_MLP),
    "gemma3": (GEMMA_NORM, GEMMA_MLP),
    "phi3": (RMSNorm("weight", 1e-5, False, True), PHI3_MLP),
    "olmo2": (RMSNorm("weight", 1e-5, False, False), LLAMA_MLP),
    "glm4": (RMSNorm("weight", 1.5625e-7, False, True), PHI3_MLP),
    "cohere": (None, LLAMA_MLP),  # LayerNorms
    "apertus": (RMSNorm("weight", 1e-5, False, True), None),  # no gate
    "starcoder2": (None, None),
    "gpt2": (None, None),
}


@pytest.mark.parametrize("family", EXPECTED)
def test_what_is_recognised(family: str) -> None:
    model = build(family)
    before = {name: p.clone() for name, p in model.named_parameters()}
    convert(model, "fp8")
    norms = {m.formula for m in patches(model, Norm)}
    mlps = {m.formula for m in patches(model, GatedMLP)}
    assert (norms or {None}, mlps or {None}) == tuple({found} for found in EXPECTED[family])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def patches(model: nn.Module, kind: Any) -> list[Any]:
    return [vars(m)["forward"] for m in model.modules() if isinstance(vars(m).get("forward"), kind)]


def test_the_exact_tier_has_none() -> None:
    model = build("llama")
    convert(model, "exact")
    assert not patches(model, Norm | GatedMLP)


def test_weights_without_values_will_do() -> None:
    with torch.device("meta"):
        model = build("llama")
    convert(model, "fp8")
    assert len(patches(model, Norm)) == 4
    assert len(patches(model, GatedMLP)) == 2


class Base(nn.Module):
    """A plain norm; those below differ from it by little."""

    def __init__(self, n: int = 64) -> None:
        super().__init__()
        self.weight, self.eps, self.scale = nn.Parameter(torch.ones(n)), 1e-5, 1e-3

    def norm(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.norm(x).to(x.dtype)


class Centred(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class EpsOutside(Base):
    def norm(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return x32 / (x32.square().mean(-1, keepdim=True).sqrt() + self.eps)


class InItsOwnDtype(Base):
    def norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class Scaled(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + self.scale)


class Partial(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super().forward(x)[..., :-1], x[..., -1:]], -1)


def test_a_norm_that_differs_is_left_alone() -> None:
    assert rmsnorm_of(Base()) == RMSNorm("weight", 1e-5, False, True)
    for kind in (Centred, EpsOutside, InItsOwnDtype, Scaled, Partial):
        assert rmsnorm_of(kind()) is None, kind
    assert rmsnorm_of(nn.LayerNorm(64)) is None
    assert rmsnorm_of(nn.SiLU()) is None


class MLP(nn.Module):
    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.act, self.drop = act or nn.SiLU(), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(x) * self.act(self.a(x)))


MLPS: list[Any] = [
    lambda m, x: m.c(m.act(m.a(x)) * m.b(x)) * 2,
    lambda m, x: m.c(m.act(m.a(x)) + m.b(x)),
    lambda m, x: m.c(m.act(m.a(x)) * m.b(x + 1)),
    lambda m, x: m.c(m.act(m.a(x) * 1.0) * m.b(x)),
    lambda m, x: m.c(m.act(m.a(x)) * (m.b(x) + 1)),
    lambda m, x: m.c(m.act(m.a(x)) * m.b(x)) + x,
    lambda m, x: m.c(m.drop(m.act(m.a(x)) * m.b(x)).relu()),
    lambda m, x: m.c(m.b(m.act(m.a(x)))),
    lambda m, x: m.c(F.linear(m.act(m.a(x)) * m.b(x), m.b.weight)),
    lambda m, x: m.drop(m.c(m.act(m.a(x)) * m.b(x))),
    lambda m, x: m.c(F.silu(m.a(x)) * m.b(x)),
    lambda m, x: m.c(m.act(m.a(x)) * m.b(x)) if x.shape[-1] == 64 else x,
]


def test_an_mlp_that_differs_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gated_of(MLP()) == Gated("a", "b", "act", "c", "silu")
    assert gated_of(MLP(nn.GELU("tanh"))) == Gated("a", "b", "act", "c", "gelu_tanh")
    for act in (nn.GELU(), nn.ReLU(), nn.PReLU(), nn.Sigmoid()):
        assert gated_of(MLP(act)) is None, act
    for i, forward in enumerate(MLPS):
        monkeypatch.setattr(MLP, "forward", forward)
        assert gated_of(MLP()) is None, i
