"""Directions: one function of seed and place, with a mean of 0, a variance of 1, and nothing in common."""

import pytest
import torch

from hf_lowmem.optim.zeroth.draws import DIRECTIONS, QUANTILES

CPU = torch.device("cpu")
each = pytest.mark.parametrize("name", DIRECTIONS)


@each
def test_a_part_has_the_whole_s_numbers(name: str) -> None:
    draw = DIRECTIONS[name]
    whole = draw(7, 0, 1000, CPU)
    for start, stop in ((0, 1), (1, 2), (31, 33), (64, 1000), (999, 1000), (333, 700)):
        assert torch.equal(draw(7, start, stop, CPU), whole[start:stop]), (start, stop)


@each
def test_moments_and_independence(name: str) -> None:
    """Of n numbers: a mean within 5 / sqrt(n) of 0, and as much for squares (variance 2) and products."""
    n = 1 << 20
    draw = DIRECTIONS[name]
    a, b = draw(1, 0, n, CPU).double(), draw(2, 0, n, CPU).double()
    for values, variance in ((a, 1), (a.square() - 1, 2), (a * b, 1), (a[1:] * a[:-1], 1), (a[2:] * a[:-2], 1)):
        assert abs(values.mean().item()) < 5 * (variance / n) ** 0.5


def test_the_table_is_the_normal_distribution_s() -> None:
    table = QUANTILES.on(CPU).double()
    assert torch.equal(table, -table.flip(0))
    assert abs(table.square().mean().item() - 1) < 1e-7
    assert abs(table.pow(4).mean().item() - 3) < 5e-3  # what is beyond the last quantile is missing
    assert table.diff().min() > 0


def test_signs_are_signs() -> None:
    assert DIRECTIONS["signs"](3, 0, 4096, CPU).unique().tolist() == [-1.0, 1.0]
