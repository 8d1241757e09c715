"""WTA-CRS: the formula against a plain form of it, unbiased gradients of weights, exact others, what is kept."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from hf_lowmem.activations.linears import linears_of_layers
from hf_lowmem.matmul.sampled import OwnedSamples, Sampled, _Lately, draw, samples_of
from hf_lowmem.memory import measure_saved
from hf_lowmem.patching import forwards_of
from tests.conftest import tiny_llama

IDS = torch.randint(128, (2, 24), generator=torch.Generator().manual_seed(0))


def norms_of(rows: int, spread: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.exp(spread * torch.randn(rows, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize(
    ("rows", "k", "spread"), [(40, 10, 1.0), (40, 39, 0.1), (7, 1, 2.0), (300, 90, 2.0), (50, 5, 0.0)]
)
def test_the_certain_rows_are_the_paper_s(rows: int, k: int, spread: float) -> None:
    """c by the plain form of its definition; certain rows have weight 1, the others (1 - P_c) / ((k - c) p)."""
    norms = norms_of(rows, spread)
    p = sorted((norms / norms.sum()).tolist(), reverse=True)
    best = min(range(k), key=lambda c: (1 - sum(p[:c])) / (k - c))
    places, weights = draw(norms, k, 3)
    assert places.shape == weights.shape == (k,)
    found = (norms / norms.sum())[places]
    assert found[:best].tolist() == pytest.approx(p[:best])
    assert (weights[:best] == 1).all()
    wanted = (1 - sum(p[:best])) / ((k - best) * found[best:])
    assert weights[best:].double().tolist() == pytest.approx(wanted.tolist(), rel=1e-6)
    assert len(set(places[:best].tolist()) & set(places[best:].tolist())) == 0


@pytest.mark.parametrize(("rows", "k", "spread"), [(24, 6, 1.0), (16, 3, 0.3)])
def test_weights_of_a_row_are_one_on_average(rows: int, k: int, spread: float) -> None:
    """Of n draws the mean weight is within 5 sigma of 1; sigma of a row by the draws themselves."""
    norms, n = norms_of(rows, spread), 3000
    sums, squares = torch.zeros(2, rows, dtype=torch.float64)
    for seed in range(n):
        places, weights = draw(norms, k, 2 * seed)
        drawn = torch.zeros(rows, dtype=torch.float64).index_add_(0, places, weights.double())
        sums, squares = sums + drawn, squares + drawn**2
    mean = sums / n
    sigma = ((squares / n - mean**2).clamp_min(0) / n).sqrt()
    assert ((mean - 1).abs() <= 5 * sigma + 1e-6).all()


def test_rows_of_zeros_are_never_drawn_and_all_zeros_do_no_harm() -> None:
    norms = torch.tensor([0.0, 2.0, 0.0, 1.0, 0.0, 0.0])
    places, weights = draw(norms, 4, 0)
    drawn = torch.zeros(6).index_add_(0, places, weights)
    assert drawn.tolist() == [0, 1, 0, 1, 0, 0]
    assert not draw(torch.zeros(6), 2, 0)[1].any()


def test_no_number_is_read_from_the_device() -> None:
    with FakeTensorMode():
        places, weights = draw(torch.ones(20), 5, 0)
    assert places.shape == weights.shape == (5,)


def linear(bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(12, 8, bias=bias, dtype=dtype).train()


def test_the_gradient_of_a_weight_is_unbiased_and_all_else_exact() -> None:
    torch.manual_seed(0)
    plain, sampled = linear(), linear()
    patch = Sampled(sampled, "q", 0.3, 0, _Lately())
    patch.put()
    x = torch.randn(2, 20, 12, dtype=torch.float64) * norms_of(40, 1.0).view(2, 20, 1)
    g = torch.randn(2, 20, 8, dtype=torch.float64)
    one = x.clone().requires_grad_()
    plain(one).backward(g)
    exact = grad_of(plain.weight)
    total, n, errors = torch.zeros_like(exact), 2000, []
    for step in range(n):
        patch.step = step
        two = x.clone().requires_grad_()
        y = sampled(two)
        assert torch.equal(y, plain(x))
        sampled.zero_grad()
        y.backward(g)
        assert torch.equal(grad_of(two), grad_of(one))
        assert torch.equal(grad_of(sampled.bias), grad_of(plain.bias))
        total += grad_of(sampled.weight)
        errors.append((grad_of(sampled.weight) - exact).norm())
    error = (total / n - exact).norm()
    spread = torch.stack(errors).square().mean().sqrt()
    assert spread > 0.05 * exact.norm()
    assert error < 4 * spread / n**0.5  # independent draws: the mean's error is spread / sqrt(n) in expectation


def grad_of(p: torch.Tensor) -> torch.Tensor:
    assert p.grad is not None
    return p.grad


def sampled_model(seed: int = 0, **overrides: Any) -> tuple[Any, OwnedSamples]:
    model = tiny_llama(**overrides).train()
    return model, OwnedSamples(linears_of_layers(model), 0.25, seed)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def test_draws_are_of_seed_name_step_and_input_and_leave_generators_alone() -> None:
    model, owned = sampled_model()
    before = torch.get_rng_state()
    first = gradients(model)
    assert torch.equal(before, torch.get_rng_state())
    again = gradients(model)
    assert all(torch.equal(first[n], again[n]) for n in first)
    owned.at_step(1)
    other = gradients(model)
    changed = {n for n in first if not torch.equal(first[n], other[n])}
    linears = {f"{name}.weight" for name in owned.report.handled if "o_proj" not in name}
    assert changed == linears
    owned.take_off()
    assert not any(list(forwards_of(m)) for m in model.modules())
    exact = gradients(model)
    assert {n for n in first if not torch.allclose(first[n], exact[n], atol=1e-6)} == linears


def test_a_checkpointed_layer_draws_the_same_again() -> None:
    layer = linear()
    Sampled(layer, "q", 0.3, 0, _Lately()).put()
    x, found = torch.randn(20, 12, dtype=torch.float64, requires_grad=True), []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        layer.zero_grad()
        run(x).sum().backward()
        found.append(grad_of(layer.weight).clone())
    assert torch.equal(*found)


def test_linears_that_read_one_input_keep_one_sample_of_it() -> None:
    model, owned = sampled_model()
    plain = copy.deepcopy(tiny_llama()).train()
    kept = []
    for of in (plain, model):
        with measure_saved(of) as saved:
            loss = of(input_ids=IDS, labels=IDS).loss
            kept.append(saved.total)
            del loss
    config, tokens, k = plain.config, IDS.numel(), IDS.numel() // 4
    wide, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    # Of q, k, v and gate, up (hidden) and of down (inner): k rows in place of all; o's input is attention's own.
    places = 3 * 12 * k  # int64 and fp32 a row
    saving = 4 * (2 * wide + inner) * (tokens - k) - places
    assert kept[0] - kept[1] == layers * saving
    assert len(owned.report.handled) == 7 * layers


def test_evaluation_and_frozen_weights_are_plain() -> None:
    model, owned = sampled_model()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, model.eval()(IDS).logits)
    frozen = tiny_llama().requires_grad_(False)
    with pytest.raises(ValueError, match=r"lowmem_sample=0.3 has no effect.*not trained.*unset"):
        samples_of(linears_of_layers(frozen), 0.3)
    assert "linears keep 25.0%" in str(owned.report)
