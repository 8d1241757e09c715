"""Directions: the random numbers along which a loss is probed, as a pure function of (seed, place in the parameter).

A direction has as many values as the model and is never stored. It is made again wherever it is needed: once in each
forward pass, layer by layer, and once for the update. So it must be the same numbers each time, on any device, and for
any part of a parameter; a generator's state would have to be walked through from the beginning.

torch's normal numbers are other ones on a GPU than on a CPU, and logarithms and cosines differ there in their last bit.
Here 16 random bits look up a quantile of the normal distribution in a table, which is made once, in fp64, on the CPU.
Its mean is 0, its variance 1, and no value is beyond 4.3.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowmem.kernels.codecs.tables import DeviceTable
from hf_lowmem.kernels.exact import paired_bits, random_bits

__all__ = ["DIRECTIONS", "Along", "normal", "signs"]

BITS = 16


def _quantiles() -> Tensor:
    """Values of the normal distribution at the middles of 2**16 equal shares, scaled to a variance of 1."""
    upper = torch.erfinv((torch.arange(1 << (BITS - 1), dtype=torch.float64) + 0.5) / (1 << (BITS - 1)))
    upper /= upper.square().mean().sqrt()
    return torch.cat((-upper.flip(0), upper)).float()


QUANTILES = DeviceTable(_quantiles)


def normal(seed: int, start: int, stop: int, device: torch.device) -> Tensor:
    """Normal numbers, fp32, for the values from `start` to `stop` of a parameter."""
    places = paired_bits(seed, start, stop, device).bitwise_right_shift_(BITS).bitwise_and_((1 << BITS) - 1)
    return QUANTILES.on(device).index_select(0, places)


def signs(seed: int, start: int, stop: int, device: torch.device) -> Tensor:
    """Fair signs, -1 or 1 in fp32, 32 of them from one hash."""
    first, last = start // 32, math.ceil(stop / 32)
    words = random_bits(seed, first, last, device)
    bits = torch.arange(32, dtype=torch.int32, device=device)
    flat = words[:, None].bitwise_right_shift(bits).bitwise_and_(1).view(-1)
    return flat[start - 32 * first : stop - 32 * first].float().mul_(2).sub_(1)


DIRECTIONS = {"normal": normal, "signs": signs}


class Along(NamedTuple):
    """Along what the values of a parameter move.

    Args:
        direction: one of `DIRECTIONS`.
        share: of the values that move, each with this chance; None: all of them.
        seed: of that choice, which stays the same in all steps.
    """

    direction: str
    share: float | None = None
    seed: int = 0

    def sum(self, terms: list[tuple[float, int]], start: int, stop: int, device: torch.device) -> Tensor:
        """The values from `start` to `stop` of a sum of directions, fp32: of pairs of a factor and a seed."""
        draw = DIRECTIONS[self.direction]
        (factor, seed), *others = terms
        total = draw(seed, start, stop, device).mul_(factor)
        for factor, seed in others:
            total.add_(draw(seed, start, stop, device).mul_(factor))
        if self.share is not None:
            places = paired_bits(self.seed, start, stop, device).bitwise_right_shift_(BITS)
            total.mul_(places.bitwise_and_((1 << BITS) - 1) < round(self.share * (1 << BITS)))
        return total
