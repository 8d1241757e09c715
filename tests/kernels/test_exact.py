"""Keys of random streams are the same whether they are made one by one or for many at once."""

import random

import torch

from hf_lowmem.kernels import exact
from hf_lowmem.kernels.exact import all_seed_keys, seed_keys


def test_the_keys_of_many_seeds_are_those_of_each() -> None:
    draw = random.Random(0)
    seeds = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, *(draw.getrandbits(63) for _ in range(300))]
    assert all_seed_keys(seeds) == [list(seed_keys(seed)) for seed in seeds]
    assert all_seed_keys([]) == []


def test_the_halves_of_a_group_are_even_and_hardly_correlated() -> None:
    """One hash for 32 values: what each is rounded by is uniform, and the sum of their errors no wider than it was."""
    count = 1 << 15
    words = exact.grouped_bits(3, 0, count * exact.GROUP, torch.device("cpu")).view(count, exact.GROUP)
    u = words.bitwise_right_shift(16).bitwise_and(0xFFFF).double().add(0.5).div(1 << 16)
    assert ((u.mean(0) - 0.5).abs() < 5 * (1 / 12 / count) ** 0.5).all()
    assert ((u.var(0) - 1 / 12).abs() < 5 * (1 / 180 / count) ** 0.5).all()
    assert (torch.corrcoef(u.T) - torch.eye(exact.GROUP)).abs().max() < 5 / count**0.5
    # The variance of a sample's variance is about 2 / count of its square.
    assert abs(u.sum(1).var().item() / (exact.GROUP / 12) - 1) < 5 * (2 / count) ** 0.5
    assert (words[:, 1::2] == exact.rotate_half(words[:, ::2])).all()
