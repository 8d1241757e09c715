"""The Power schedule: the paper's figures and its equation 8, computed here in another way; and what is refused."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hf_lowmem.optim.schedules import PowerSpec, get_power_schedule

TOKENS = 1024 * 4096


def rates(spec: PowerSpec, steps: int, warmup: int, lr: float = 0.1) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = get_power_schedule(optimizer, warmup, steps, spec)
    found = []
    for _ in range(steps + 1):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


def test_the_law_is_the_paper_s() -> None:
    """Section 3: 10 trillion tokens at batch 1,024 and a = 4.6 want 0.0011."""
    spec = PowerSpec(tokens_per_step=TOKENS, a=4.6)
    assert spec.law(round(1e13 / TOKENS)) == pytest.approx(0.0011, rel=0.01)


def test_the_schedule_is_equation_8() -> None:
    spec, steps, warmup, decay = PowerSpec(tokens_per_step=TOKENS, decay_steps=200), 1000, 50, 200

    def power(n: int) -> float:
        return min(0.1, 4 * 1024 * math.exp(-0.51 * math.log(n * TOKENS)))

    found = rates(spec, steps, warmup)
    for n in (1, 17, 49):
        assert found[n] == pytest.approx(n / warmup * power(warmup), rel=1e-12)
    for n in (50, 51, 400, 800):
        assert found[n] == pytest.approx(power(n), rel=1e-12)
    assert found[50] == 0.1  # the bound
    assert found[700] < found[600] < 0.1
    assert found[0] == 0.0
    ratios = [
        (found[n + 1] + 0.01 / 0.99 * power(800)) / (found[n] + 0.01 / 0.99 * power(800)) for n in (801, 900, 998)
    ]
    assert ratios == pytest.approx([0.01 ** (1 / decay)] * 3, rel=1e-9)  # exponential
    assert found[steps] == pytest.approx(0.0, abs=1e-18)


def test_a_run_of_another_length_has_the_same_rates_before_its_decay() -> None:
    short, long = (rates(PowerSpec(tokens_per_step=TOKENS), n, 20) for n in (600, 1200))
    assert short[:540] == long[:540]


def test_batch_and_steps_trade() -> None:
    """Twice the batch, after as many tokens, has twice the rate."""
    one, two = PowerSpec(tokens_per_step=TOKENS), PowerSpec(tokens_per_step=2 * TOKENS)
    assert two.law(500) == pytest.approx(2 * one.law(1000), rel=1e-12)


def spec(**options: Any) -> Callable[[], Any]:
    return lambda: PowerSpec.from_options("", {"tokens_per_step": TOKENS, **options})


@pytest.mark.parametrize(
    ("make", "error", "what"),
    [
        (spec(tokens_per_step=0), ValueError, "tokens_per_step=0: must be at least 1"),
        (spec(tokens_per_step=1.5), TypeError, "tokens_per_step=1.5: expected an integer"),
        (spec(a=0), ValueError, "a=0: must be"),
        (spec(b=0.0), ValueError, "b=0.0: must be negative"),
        (spec(decay_steps=-1), ValueError, "decay_steps=-1"),
        (spec(decay_steps=2.5), TypeError, "decay_steps=2.5"),
        (spec(A=3), ValueError, "option='A' is not available.*'a'|option='A'"),
        (lambda: rates(PowerSpec(TOKENS, decay_steps=90), 100, 20), ValueError, "decay_steps=90 with 20 steps"),
        (lambda: rates(PowerSpec(TOKENS), 100, 10, lr=1e-5), ValueError, "learning_rate=1e-05: the power law is never"),
        (lambda: rates(PowerSpec(TOKENS), 100, 10, lr=0.0), ValueError, "learning_rate=0.0"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], Any], error: type[Exception], what: str) -> None:
    with pytest.raises(error, match=what):
        make()
