"""Norms beside the layers, in tiles of tokens: the plain norm's bits, and its input kept alone."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm

from hf_lowmem.activations import OwnedTiers, ends
from hf_lowmem.activations.blocks import patches
from hf_lowmem.activations.ends import NO_NORM, TiledNorm
from hf_lowmem.memory import measure_saved
from hf_lowmem.specs import ActivationSpec
from tests.activations.models import EXPERTS, FAMILIES, batch, build, loss_and_gradients

NORMS: dict[str, Any] = {
    "llama": LlamaRMSNorm,
    "gemma": GemmaRMSNorm,
    "layer_norm": nn.LayerNorm,
    "rms_norm": nn.RMSNorm,
    "olmo": OlmoLayerNorm,
}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ends, "TILE", 5)


def run(norm: nn.Module, x: Tensor, grad: Tensor, **cast: Any) -> list[Tensor]:
    """Output and gradients: of the input, then of the parameters."""
    norm.zero_grad()
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(cast)):
        y = norm(leaf * 1)
    y.backward(grad.to(y.dtype))
    return [y.detach(), *(t.grad for t in (leaf, *norm.parameters()) if t.grad is not None)]


@pytest.mark.parametrize("how", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("kind", NORMS)
def test_a_tiled_norm_has_the_plain_ones_bits(kind: str, how: str, small_tiles: None) -> None:
    """Of output and input's gradient. A weight's is a sum over tiles, each rounded once: judged by the one in float64,
    as far from it as the plain one is and one rounding of bf16 (2**-9) more."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if how == "bf16" else torch.float32
    norm = NORMS[kind](64).to(dtype).train()
    for p in norm.parameters():
        nn.init.normal_(p)
    x, grad, twin = torch.randn(2, 13, 64).to(dtype), torch.randn(2, 13, 64), copy.deepcopy(norm).double()
    cast = {"cast": True} if how == "autocast" else {}
    plain = run(norm, x, grad, **cast)
    assert ends._by_rows(norm)
    TiledNorm(norm).put()
    tiled = run(norm, x, grad, **cast)
    assert torch.equal(plain[0], tiled[0])
    assert torch.equal(plain[1], tiled[1])
    assert len(plain) == len(tiled) == 2 + len(list(norm.parameters()))
    exact = run(twin, x.double(), grad)
    for a, b, truth in zip(plain[2:], tiled[2:], exact[2:], strict=True):
        assert b.dtype == dtype
        off = [((t - truth).norm() / truth.norm()).item() for t in (a, b)]
        assert off[1] <= off[0] + (2.0**-9 if how == "bf16" else 1e-6), off


def test_hooks_of_a_weight_see_one_gradient(small_tiles: None) -> None:
    norm = LlamaRMSNorm(64).train()
    seen: list[str] = []
    norm.weight.register_hook(lambda grad: seen.append("hook"))
    norm.weight.register_post_accumulate_grad_hook(lambda p: seen.append("post"))
    TiledNorm(norm).put()
    norm(torch.randn(3, 9, 64, requires_grad=True)).sum().backward()
    assert seen == ["hook", "post"]


def test_frozen_weights_and_inputs_without_gradient(small_tiles: None) -> None:
    norm, x, grad = LlamaRMSNorm(64).train(), torch.randn(1, 17, 64), torch.randn(1, 17, 64)
    plain = run(norm, x, grad)
    TiledNorm(norm).put()
    norm.zero_grad()
    norm(x).backward(grad)
    torch.testing.assert_close(norm.weight.grad, plain[2])
    norm.weight.requires_grad_(False)
    norm.zero_grad()
    frozen = run(norm, x, grad)
    assert len(frozen) == 2
    assert torch.equal(frozen[1], plain[1])


def test_a_changed_weight_is_an_error(small_tiles: None) -> None:
    norm = LlamaRMSNorm(64).train()
    TiledNorm(norm).put()
    y = norm(torch.randn(1, 17, 64, requires_grad=True))
    with torch.no_grad():
        norm.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_its_input_is_all_that_is_kept(small_tiles: None) -> None:
    """Of 40 tokens of 64 values in bf16: 5,120 bytes, where the plain norm keeps four times as much."""
    norm = LlamaRMSNorm(64).to(torch.bfloat16).train()
    x = torch.randn(1, 40, 64, dtype=torch.bfloat16, requires_grad=True)
    counts = []
    for patch in (None, TiledNorm(norm)):
        if patch is not None:
            patch.put()
        with measure_saved(norm) as saved:
            y = norm(x * 1)
            counts.append(saved.total)
        del y
    assert counts[1] == x.nbytes
    assert counts[0] > 3 * x.nbytes


@pytest.mark.parametrize("switch", ["eval", "few"])
def test_it_stands_aside(switch: str, small_tiles: None) -> None:
    norm = LlamaRMSNorm(64).train(switch != "eval")
    TiledNorm(norm).put()
    y = norm(torch.randn(1, 5 if switch == "few" else 17, 64, requires_grad=True))
    assert "ByTiles" not in y.grad_fn.name()


class Whole(nn.Module):
    """A norm over all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))

    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm() * self.weight


@pytest.mark.parametrize("module", [Whole(), nn.Dropout(0.1), nn.BatchNorm1d(64), nn.Linear(64, 64), nn.Identity()])
def test_what_does_not_work_row_by_row_is_left_alone(module: nn.Module) -> None:
    assert not ends._by_rows(module)


def test_a_model_without_such_a_norm_is_told_so() -> None:
    model = build("llama")
    model.model.norm = Whole().train()
    owned = OwnedTiers(model, ActivationSpec(tiers="checkpoint_fp8"), "a test")
    assert NO_NORM in str(owned.report)


@pytest.mark.parametrize("tier", ["exact", "fp8", "hooks_fp8"])
def test_tiers_that_keep_more_leave_the_norm_alone(tier: str) -> None:
    owned = OwnedTiers(build("llama"), ActivationSpec(tiers=tier), "a test")
    assert not any(isinstance(patch, TiledNorm) for patch in patches(owned.model))
    assert NO_NORM not in str(owned.report)


@pytest.mark.parametrize("family", [*FAMILIES, *EXPERTS])
def test_each_familys_last_norm_is_found_and_given_back(
    family: str, small_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family)
    before = {n for n, m in model.named_modules() if "forward" in vars(m)}
    monkeypatch.setattr(ends, "TILE", 2**20)
    owned = OwnedTiers(model, ActivationSpec(tiers="checkpoint_fp8"), "a test")
    loss, grads = loss_and_gradients(model, batch())
    monkeypatch.setattr(ends, "TILE", 5)
    tiled, others = loss_and_gradients(model, batch())
    assert any(isinstance(patch, TiledNorm) for patch in patches(model))
    assert torch.equal(loss, tiled)
    assert grads.keys() == others.keys()
    for name, grad in grads.items():
        assert (grad - others[name]).norm() <= 1e-6 * grad.norm() + 1e-9, name
    owned.take_off()
    assert {n for n, m in model.named_modules() if "forward" in vars(m)} == before
