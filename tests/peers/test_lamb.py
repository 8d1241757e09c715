"""LAMB against its formula in float64, written naively. (bitsandbytes' LAMB has no trust ratio and is no oracle.)"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem.optim.lamb import Lamb

STEPS = 100
SETTINGS: dict[str, Any] = {"lr": 5e-3, "betas": (0.9, 0.98), "eps": 1e-6}


class Formula:
    """Algorithm 2 of arXiv 1904.00962 for one matrix or vector, number by number where it can be."""

    def __init__(self, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.m: Any = 0.0
        self.v: Any = 0.0
        self.t = 0
        self.ratio = math.nan

    def step(self, x: Tensor, g: Tensor) -> Tensor:
        b1, b2 = self.betas
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        m_hat, v_hat = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        u = m_hat / (v_hat.sqrt() + self.eps) + self.weight_decay * x
        size, length = math.sqrt((x * x).sum().item()), math.sqrt((u * u).sum().item())
        self.ratio = min(max(size, 0.0), 10.0) / length if size > 0 and length > 0 else 1.0
        return x - self.lr * self.ratio * u


def gradient(shape: tuple[int, ...], step: int) -> Tensor:
    base = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(step + 1))
    return (base + 0.5 * noise) * (1 + 4 * (step % 17 == 0)) * math.exp(-step / 60)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("shape", "size", "clipped"),
    [
        ((), 1.0, False),
        ((31,), 1.0, False),
        ((31,), 0.0, False),  # starts at zero: ratio 1 in the first step only
        ((40, 24), 0.1, False),
        ((65, 7), 3.0, True),  # norm 64: phi takes 10
        ((3, 20, 30), 0.1, False),  # three experts, a ratio each
        ((2, 3, 4, 5), 0.5, False),  # a convolution: one ratio
    ],
    ids=str,
)
def test_agrees_with_the_formula(shape: tuple[int, ...], size: float, clipped: bool, weight_decay: float) -> None:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(99)) * size
    if len(shape) == 3:
        start = start * torch.tensor([0.1, 1.0, 30.0])[:, None, None]  # the last expert's norm is above 10
    p = nn.Parameter(start.clone())
    optimizer = Lamb([p], weight_decay=weight_decay, experts=len(shape) == 3, **SETTINGS)
    parts = [start[i] for i in range(3)] if len(shape) == 3 else [start]
    truth = [part.double() for part in parts]
    formulas = [Formula(weight_decay=weight_decay, **SETTINGS) for _ in parts]
    worst = 0.0
    for step in range(STEPS):
        p.grad = gradient(shape, step)
        optimizer.step()
        grads = p.grad.double().unbind() if len(shape) == 3 else [p.grad.double()]
        truth = [f.step(x, g) for f, x, g in zip(formulas, truth, grads, strict=True)]
        ours = p.detach().double().unbind() if len(shape) == 3 else [p.detach().double()]
        worst = max(worst, *((a - b).abs().max().item() for a, b in zip(ours, truth, strict=True)))
        if step == 0 and size == 0:
            assert formulas[0].ratio == 1.0
        elif step == 0:
            assert formulas[-1].ratio != 1.0, "the trust ratio has something to say"
    moved = (p.detach() - start).abs().max().item()
    print(f"{shape} size {size} decay {weight_decay}: largest difference {worst:.1e}, moved {moved:.3f}")
    assert not clipped or truth[0].norm() > 10
    assert moved > 5e-3, "the weights went somewhere"
    # Weights of size w carry an error of w * 2**-24 from each of 100 roundings, at most 6e-6 for w = 1.
    assert worst <= 1e-5


@pytest.mark.parametrize("shape", [(), (31,), (40, 24)], ids=str)
def test_without_adapted_vectors_they_take_ratio_one(shape: tuple[int, ...]) -> None:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    adapted, plain = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    truth = start.clone().double()
    formula = Formula(weight_decay=0.1, **SETTINGS)
    one, other = (
        Lamb([p], weight_decay=0.1, adapt_vectors=flag, **SETTINGS) for p, flag in ((adapted, True), (plain, False))
    )
    for step in range(20):
        adapted.grad, plain.grad = gradient(shape, step), gradient(shape, step)
        one.step()
        other.step()
        before = truth
        truth = formula.step(before, gradient(shape, step).double())
        if len(shape) < 2:
            truth = before + (truth - before) / formula.ratio
    assert (plain - truth).abs().max() <= 1e-5
    assert torch.equal(adapted, plain) == (len(shape) == 2)


def test_a_bias_that_starts_at_zero_is_held_there_unless_it_is_left_out() -> None:
    moved = {}
    for flag in (True, False):
        p = nn.Parameter(torch.zeros(64))
        optimizer = Lamb([p], lr=1e-3, adapt_vectors=flag)
        for _ in range(STEPS):
            p.grad = torch.ones(64)
            optimizer.step()
        moved[flag] = p.abs().max().item()
    # Adam's 100 steps of 1e-3; and one such step that then grows by a thousandth at a time.
    assert moved[False] == pytest.approx(0.1, rel=1e-3)
    assert moved[True] == pytest.approx(1e-3 * 1.001**99, rel=1e-3)


def test_a_flag_is_a_flag() -> None:
    with pytest.raises(TypeError, match="adapt_vectors='no': expected True or False"):
        Lamb([nn.Parameter(torch.zeros(5))], adapt_vectors="no")
