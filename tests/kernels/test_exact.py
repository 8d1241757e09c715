"""Keys of random streams are the same whether they are made one by one or for many at once."""

import random

from hf_lowmem.kernels.exact import all_seed_keys, seed_keys


def test_the_keys_of_many_seeds_are_those_of_each() -> None:
    draw = random.Random(0)
    seeds = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, *(draw.getrandbits(63) for _ in range(300))]
    assert all_seed_keys(seeds) == [list(seed_keys(seed)) for seed in seeds]
    assert all_seed_keys([]) == []
