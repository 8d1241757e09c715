"""Stores of bf16 weights: rounding at random is unbiased, and 24 bits are 24 bits."""

import pytest
import torch
from torch import Tensor

from hf_lowmem.weights import join_24, round_stochastic, split_24


def every_magnitude(n: int = 200_000) -> Tensor:
    """Both signs of every exponent that bf16 has, denormals included."""
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 0x7F7F_0000, (n,), generator=g, dtype=torch.int32)  # up to bf16's largest value
    signs = torch.randint(0, 2, (n,), generator=g).mul(2).sub(1)
    return bits.view(torch.float32) * signs


def neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """The bf16 values towards zero and away from it, as fp32."""
    toward = (x.view(torch.int32) & -(1 << 16)).view(torch.float32)
    away = (toward.view(torch.int32) + (1 << 16)).view(torch.float32)
    return toward, away


def test_rounds_to_a_neighbour_and_keeps_what_is_exact() -> None:
    x = every_magnitude()
    toward, away = neighbours(x)
    got = round_stochastic(x, 1).float()
    assert ((got == toward) | (got == away)).all()
    exact = x.bfloat16()
    assert torch.equal(round_stochastic(exact.float(), 2), exact)


@pytest.mark.parametrize("fraction", [0.03, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1, -1])
def test_expectation_is_the_value(fraction: float, sign: int) -> None:
    n = 100_000
    x = torch.full((n,), sign * (1.0 + fraction * 2**-7))
    up = (round_stochastic(x, 3).float().abs() > 1.0).double().mean().item()
    # Five standard deviations of a binomial mean, and the 2**-16 by which `fraction` is itself rounded.
    assert abs(up - fraction) < 5 * (fraction * (1 - fraction) / n) ** 0.5 + 2**-16


def test_the_seed_alone_decides() -> None:
    x = every_magnitude(5000)
    torch.manual_seed(0)
    first = round_stochastic(x, 7)
    before = torch.get_rng_state()
    assert torch.equal(round_stochastic(x, 7), first)
    assert torch.equal(torch.get_rng_state(), before), "the global stream is left alone"
    assert not torch.equal(round_stochastic(x, 8), first)


def test_24_bits_come_back() -> None:
    x = every_magnitude()
    weight, correction = split_24(x)
    got = join_24(weight, correction)
    # Half a unit in the last of 24 stored bits: the sign, 8 of exponent, 15 of mantissa. Denormals have a fixed unit.
    assert ((got.double() - x.double()).abs() <= (2.0**-16 * x.double().abs()).clamp(min=2.0**-142)).all()
    stored = (x.view(torch.int32) & -(1 << 8)).view(torch.float32)
    assert torch.equal(join_24(*split_24(stored)), stored), "what fits is exact"


def test_the_weight_is_the_nearest_bf16() -> None:
    x = every_magnitude()
    weight, _ = split_24(x)
    toward, away = neighbours(x)
    # Rounding to 24 bits first may move a value across the middle by 2**-8 of half the gap.
    error = (weight.double() - x.double()).abs()
    least = torch.minimum((x.double() - toward.double()).abs(), (x.double() - away.double()).abs())
    assert (error <= least + (away.double() - toward.double()).abs() * 2.0**-8).all()
    assert ((weight.float() == toward) | (weight.float() == away)).all()


def test_carrying_does_not_drift() -> None:
    weight, correction = split_24(every_magnitude(5000))
    again = join_24(weight, correction)
    for _ in range(3):
        w, c = split_24(again)
        again = join_24(w, c)
        assert torch.equal(w, weight)
        assert torch.equal(c, correction)


@pytest.mark.parametrize("byte", [-128, -1, 0, 1, 127])
def test_a_weight_that_somebody_else_wrote_stays_itself(byte: int) -> None:
    weight = torch.tensor([0.0, -0.0, 1.0, -3.5, 1e-40, torch.finfo(torch.bfloat16).max], dtype=torch.bfloat16)
    got = join_24(weight, torch.full(weight.shape, byte, dtype=torch.int8))
    assert got.isfinite().all()
    assert ((got - weight.float()).abs() <= weight.float().abs() * 2.0**-8 + 2.0**-133).all()


def test_any_strides_and_shapes() -> None:
    x = every_magnitude(6 * 40 * 33).view(6, 40, 33)
    for view in (x.transpose(0, 2), x[:, ::3], x[0, 0, 0], x[:0]):
        flat = view.contiguous()
        assert torch.equal(join_24(*split_24(view)), join_24(*split_24(flat)))
        assert torch.equal(round_stochastic(view, 1), round_stochastic(flat, 1))
