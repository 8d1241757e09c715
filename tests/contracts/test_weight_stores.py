"""What a store of bf16 weights promises, under every method: the whole table."""

import io
from typing import Any

import pytest
import torch
from torch import nn

from hf_lowmem.memory import optimizer_bytes
from hf_lowmem.optim import OPTIMIZERS, slot
from hf_lowmem.optim.state import values_of
from hf_lowmem.weights import join_24
from tests.conftest import Mixed
from tests.contracts.test_optimizers import make, same_bits, train, trainable, weights

STORES = ("bf16_sr", "bf16_ecc")
STEPS = 60
each_method = pytest.mark.parametrize("name", OPTIMIZERS)
each_store = pytest.mark.parametrize("store", STORES)


def narrow() -> Mixed:
    return Mixed().to(torch.bfloat16)


@pytest.mark.train
@each_method
@each_store
def test_save_load_continue_is_uninterrupted(name: str, store: str) -> None:
    model = narrow()
    optimizer = make(name, "8bit", model, weights=store)
    train(model, optimizer, range(5))
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    train(model, optimizer, range(5, 9))
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    again = narrow()
    again.load_state_dict(saved["model"])
    resumed = make(name, "8bit", again, weights=store)
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, range(5, 9))
    assert all(torch.equal(p, q) for p, q in zip(weights(model), weights(again), strict=True))
    assert same_bits(resumed.state_dict(), optimizer.state_dict())


@each_method
def test_bf16_with_its_correction_is_three_bytes_a_weight(name: str) -> None:
    plain, corrected = narrow(), narrow()
    states = []
    for model, store in ((plain, "keep"), (corrected, "bf16_ecc")):
        optimizer = make(name, "fp32", model, weights=store)
        train(model, optimizer, range(2))
        promised = sum(optimizer.state_bytes(p, g) for g in optimizer.param_groups for p in g["params"] if p.numel())
        assert optimizer_bytes(optimizer) == promised
        states.append(sum(v.nbytes for state in optimizer.state.values() for v in values_of(state).values()))
    count = sum(p.numel() for p in trainable(plain))
    assert sum(p.nbytes for p in trainable(corrected)) + states[1] - states[0] == 3 * count
    assert {p.dtype for p in corrected.state_dict().values()} == {torch.bfloat16}


@each_method
@each_store
def test_replicas_are_equal_and_the_order_is_free(name: str, store: str) -> None:
    one, other = narrow(), narrow()
    first, second = (make(name, "8bit", m, weights=store) for m in (one, other))
    torch.manual_seed(1)
    train(one, first, range(3))
    torch.manual_seed(2)
    for step in range(3):
        other.zero_grad()
        other.loss(step).backward()
        for group in reversed(second.param_groups):
            for p in reversed(group["params"]):
                if p.grad is not None:
                    second.step_param(p, group)
    assert all(torch.equal(p, q) for p, q in zip(weights(one), weights(other), strict=True))


def test_another_seed_rounds_otherwise() -> None:
    results = []
    for seed in (0, 1):
        model = narrow()
        train(model, make("adamw", "fp32", model, weights="bf16_sr", seed=seed), range(2))
        results.append(model.linear.weight.detach())
    assert not torch.equal(*results)


@each_method
@each_store
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_bad_gradient_leaves_the_weight_and_its_correction(
    name: str, store: str, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if asynchronous:
        monkeypatch.setattr(slot, "reads_are_free", lambda device: False)
    model = narrow()
    optimizer = make(name, "8bit", model, weights=store)
    train(model, optimizer, range(2))
    before = model.linear.weight.detach().clone()
    state = {k: v.clone() for k, v in values_of(optimizer.state[model.linear.weight]).items()}
    model.zero_grad()
    (model.linear.weight * float("nan")).sum().backward()
    optimizer.step()
    assert torch.equal(model.linear.weight, before)
    assert all(torch.equal(v, optimizer.state[model.linear.weight][k]) for k, v in state.items())


def follow(name: str, dtype: torch.dtype, store: str) -> tuple[torch.Tensor, dict[str, Any]]:
    """A matrix after many updates that bf16 is too coarse for. Gradients do not depend on it, so runs compare."""
    generator = torch.Generator().manual_seed(3)
    layer = nn.Linear(96, 64, bias=False).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(64, 96, generator=generator).bfloat16())
    optimizer = make(name, "fp32", layer, lr=1e-3, weights=store)
    drift = torch.randn(64, 96, generator=generator)
    for _ in range(STEPS):
        layer.weight.grad = (drift + 0.3 * torch.randn(64, 96, generator=generator)).bfloat16().to(dtype)
        optimizer.step()
    return layer.weight.detach(), optimizer.state[layer.weight]


@each_method
def test_updates_too_small_for_bf16_are_not_lost(name: str) -> None:
    wide, _ = follow(name, torch.float32, "keep")
    moved = (wide - wide.bfloat16().float()).abs().mean()
    kept, _ = follow(name, torch.bfloat16, "keep")
    rounded, _ = follow(name, torch.bfloat16, "bf16_sr")
    coarse, state = follow(name, torch.bfloat16, "bf16_ecc")
    fine = join_24(coarse, state["correction"])
    assert moved > 0

    # 24 bits: each step rounds by at most 2**-16 of a weight, and rounding to bf16 loses 256 times as much.
    distance = (wide - kept.float()).norm()
    assert (wide - fine).norm() < 0.2 * distance
    # Rounded at random: the errors of single weights are as large, their sum over 6144 of them is not.
    unit = 2.0**-7 * wide.abs()  # at least a unit in the last place of bf16
    noise = (STEPS * unit.square().sum() / 4).sqrt()  # each step adds a variance of at most a quarter of its square
    assert (rounded.float() - wide).sum().abs() < 5 * noise
    assert torch.equal(coarse, fine.bfloat16()) or ((coarse.float() - fine).abs() <= unit / 2).all()
