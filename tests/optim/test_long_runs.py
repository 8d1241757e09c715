"""States over hundreds of steps stay beside fp32's. scripts/bench/long_run.py has 20,000 steps and more kinds."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem.codecs import CODECS, PAIRS
from hf_lowmem.kernels.codecs.weights import join_24
from hf_lowmem.kernels.step.reference import load_weight, save_weight
from hf_lowmem.optim import OPTIMIZERS, LowMemOptimizer
from hf_lowmem.optim.state import WINDOW, values_of

pytestmark = pytest.mark.train  # hundreds of steps and more

STATES = [*(name for name in CODECS if name != "fp32"), *PAIRS]
KINDS = ("stationary", "falling", "rare", "channels")


def gradients(steps: int, shape: tuple[int, int]) -> list[Tensor]:
    """(kinds, rows, columns) of each step: normal; the same, ten times smaller after a tenth of the run; rows that have
    one in 5 % of the steps; normal, of another size from value to value."""
    draw = torch.Generator().manual_seed(0)
    sizes = torch.ones(len(KINDS), *shape)
    sizes[KINDS.index("channels")] = torch.exp(torch.randn(shape, generator=draw))
    found = []
    for step in range(steps):
        grad = torch.randn(len(KINDS), *shape, generator=draw) * sizes
        grad[KINDS.index("falling")] *= 1 if step < steps // 10 else 0.1
        grad[KINDS.index("rare")] *= torch.rand(shape[0], 1, generator=draw) < 0.05
        found.append(grad)
    return found


def updates(state: str, beta2: float, grads: list[Tensor], window: int) -> Tensor:
    """Root of the mean square of AdamW's update in the last `window` steps, for each kind."""
    p = nn.Parameter(torch.zeros_like(grads[0]))
    optimizer = OPTIMIZERS["adamw"]([("w", p)], lr=1.0, betas=(0.9, beta2), state=state)
    total = torch.zeros(len(KINDS), dtype=torch.float64)
    for step, grad in enumerate(grads):
        p.data.zero_()
        p.grad = grad.clone()
        optimizer.step()
        if step >= len(grads) - window:
            total += p.detach().square().mean((1, 2))
    return (total / window).sqrt()


@pytest.mark.parametrize(("beta2", "steps"), [(0.95, 200), (0.999, 500)])
def test_the_update_keeps_its_size(beta2: float, steps: int) -> None:
    grads, window = gradients(steps, (24, 64)), steps // 3
    want = updates("fp32", beta2, grads, window)
    for state in STATES:
        ratio = updates(state, beta2, grads, window) / want
        # Four bits: a first moment has steps as wide as its values. Of rows, as wide as a half block here, see int4.py.
        limit = 0.03 if state == "int4" else 0.01
        assert ((ratio - 1).abs() < limit).all(), (
            f"{state}, beta2 {beta2}: {dict(zip(KINDS, ratio.tolist(), strict=True))}"
        )


def run(name: str, state: str, steps: int, **options: Any) -> tuple[LowMemOptimizer, nn.Parameter]:
    """Gradients of two directions and noise, ten times smaller after 50 steps."""
    draw = torch.Generator().manual_seed(1)
    p = nn.Parameter(torch.zeros(64, 72))
    optimizer = OPTIMIZERS[name]([("w", p)], lr=1e-3, state=state, betas=(0.9, 0.999), **options)
    shape = torch.randn(64, 2, generator=draw) @ torch.randn(2, 72, generator=draw)
    for step in range(steps):
        noise = torch.randn(64, 72, generator=draw)
        p.grad = (noise + shape * torch.randn((), generator=draw)) * (1.0 if step < 50 else 0.1)
        optimizer.step()
    return optimizer, p


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("galore", {"rank": 8}),
        ("natural_galore", {"rank": 8}),
        ("apollo", {"rank": 8}),
        ("soap", {}),
    ],
)
def test_second_moments_of_the_other_methods_fall_with_the_gradients(name: str, options: dict[str, Any]) -> None:
    found = []
    for state in ("fp32", "8bit"):
        optimizer, p = run(name, state, 500, **options)
        states = optimizer.slot(p, optimizer.param_groups[0])
        v = states.load("exp_avg_sq")
        found.append((v.double().rsqrt().mean(), p.detach().norm(), optimizer.state[p]))
    (want, length, plain), (got, other, coded) = found
    assert got / want == pytest.approx(1, abs=0.02)
    assert other / length == pytest.approx(1, abs=0.02)
    # What is no codec's keeps fp32: SOAP's averages of products, and the limiter's memory, which follows.
    kept = [key for key in plain if key.split("_")[0] in ("factor", "basis", "prev") and "." not in key]
    for key in set(kept) & set(coded):
        assert coded[key].dtype == torch.float32
        if key == "prev_norm":
            assert coded[key].item() == pytest.approx(plain[key].item(), rel=0.05)


def test_a_window_of_many_small_gradients_is_summed_in_fp32() -> None:
    p = nn.Parameter(torch.zeros(64, 72, dtype=torch.bfloat16))
    optimizer = OPTIMIZERS["galore"]([("w", p)], rank=8, state="8bit")
    group = optimizer.param_groups[0]
    draw = torch.Generator().manual_seed(0)
    first = torch.randn(64, 72, generator=draw).bfloat16()
    p.grad = first
    optimizer.accumulate_param(p, group)
    alone = optimizer.state[p][WINDOW].clone()
    for _ in range(1000):
        p.grad = first * 2.0**-10
        optimizer.accumulate_param(p, group)
    window = optimizer.state[p][WINDOW]
    assert window.dtype == torch.float32
    assert torch.allclose(window, alone * (1 + 1000 * 2.0**-10), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("store", ["bf16_sr", "bf16_ecc"])
def test_twenty_thousand_small_updates_of_a_bf16_weight_arrive(store: str) -> None:
    """Each an eighth of half a step of 24 bits, and a four-thousandth of half a step of a bf16."""
    p = torch.full((512,), 1.25, dtype=torch.bfloat16)
    correction = torch.zeros(512, dtype=torch.int8) if store == "bf16_ecc" else None
    update = 2.0**-20  # exact in fp32 beside such a weight
    for step in range(20_000):
        weights = load_weight(p, correction)
        save_weight(p, weights - update, correction, step)
    got = p.float() if correction is None else join_24(p, correction)
    # A walk of steps of one unit u: its variance is 0.02 u, 2**-7 or 2**-15 here, over 512 weights.
    unit = 2.0**-7 if correction is None else 2.0**-15
    assert (1.25 - got.double()).mean() == pytest.approx(20_000 * update, abs=5 * (0.02 * unit / 512) ** 0.5)


def test_a_run_that_is_resumed_draws_the_same_numbers() -> None:
    grads = gradients(6, (24, 64))
    results = []
    for stop in (None, 3):
        p = nn.Parameter(torch.zeros_like(grads[0]))
        optimizer = OPTIMIZERS["adamw"]([("w", p)], lr=1e-3, state="8bit")
        for step, grad in enumerate(grads):
            if step == stop:
                saved = optimizer.state_dict()
                optimizer = OPTIMIZERS["adamw"]([("w", p)], lr=1e-3, state="8bit")
                optimizer.load_state_dict(saved)
            p.grad = grad.clone()
            optimizer.step()
        results.append((p, optimizer.state[p]))
    (p, one), (q, other) = results
    assert torch.equal(p, q)
    assert all(torch.equal(v, other[k]) if isinstance(v, Tensor) else v == other[k] for k, v in one.items())


def of_the_old_format(state: str) -> tuple[LowMemOptimizer, nn.Parameter, dict[str, Any]]:
    """An optimizer and its state dict as 0.1.0 wrote it: bf16 scales, and no key of random numbers."""
    optimizer, p = run("adamw", state, 4)
    saved = copy.deepcopy(optimizer.state_dict())
    raw = saved["state"][0]
    for name in [k for k in raw if "scale" in k and state != "int8" and state != "fp8"]:
        raw[name] = raw[name].to(torch.bfloat16)
    raw.pop("key")
    return optimizer, p, saved


@pytest.mark.parametrize("state", ["8bit", "int8", "int8_softsign", "fp8_expand", "int4"])
def test_checkpoints_of_the_old_format_are_read(state: str) -> None:
    optimizer, p, saved = of_the_old_format(state)
    group = optimizer.param_groups[0]
    layout = {k: v.dtype for k, v in values_of(optimizer.state[p]).items()}
    fresh = OPTIMIZERS["adamw"]([("w", p)], lr=1e-3, state=state, betas=(0.9, 0.999))
    fresh.load_state_dict(saved)
    assert {k: v.dtype for k, v in values_of(fresh.state[p]).items()} == layout
    before, after = (o.slot(p, group).load("exp_avg_sq") for o in (optimizer, fresh))
    assert torch.allclose(before, after, rtol=2.0**-7)
    p.grad = torch.ones_like(p)
    fresh.step()
    assert p.isfinite().all()


def test_a_state_that_was_cast_is_refused_by_name() -> None:
    _, p, saved = of_the_old_format("8bit")
    saved["state"][0]["exp_avg_sq.uscale"] = saved["state"][0]["exp_avg_sq.uscale"].half()
    fresh = OPTIMIZERS["adamw"]([("w", p)], lr=1e-3, state="8bit", betas=(0.9, 0.999))
    with pytest.raises(
        ValueError,
        match=r"'exp_avg_sq.uscale' in torch.float16, expected torch.float32.*Take a checkpoint that is whole",
    ):
        fresh.load_state_dict(saved)
