"""Codes rounded at random, so that a state which is an average stays unbiased over any number of steps.

A moment changes by a part 1 - beta of itself a step: at beta2 = 0.999 by a tenth of a per cent, a small fraction of the
distance between two 8-bit codes. Rounded to the nearest code such a change is lost, each time, and the average never
moves down again (arXiv 2110.02861's codec has that fault, bitsandbytes#1165). Rounded up or down at random, with
probabilities that make the expectation exact *given what is encoded*, it arrives on average, however small it is.
Nothing has to be known of the past, so the promise holds for any beta and any contents of a block.

**What is exact on average** depends on what the state is for. A first moment adds to the weights: its value is. A second
moment divides them: its logarithm is. Rounded that way, E[log v] moves as it would without rounding; where v neither
rises nor falls that says E[g**2 / v - 1] = 0, so the mean of 1 / v is the right one, whatever the distance of two codes.
With an exact mean of v itself, that of 1 / v would be too large by half the distance of two codes: measured, an update
2.5 % too large with `fp8` at beta2 = 0.999, against 0.2 % at most. The price is a mean of v that is too large instead, by 1 to
6 % with 8 bits.

**Scales** are exact, fp32, or rounded up where an eighth of a bit is small beside the noise of the state (first moments).
A scale below the block's largest value would cut it. One that is rounded to bf16 jumps by 0.4 to 0.8 % where the values
change by 0.1 %, and each jump rounds a whole block anew: measured, v grew twice as far from its mean, and the update was
1.5 % too large while gradients fell.

Independent numbers, not a low-discrepancy sequence in time (an element's threshold turned by the golden ratio at each
step): that halves the noise, but nothing makes it independent of what it rounds, and with scales that jump it resonated
(a second moment 2.4 times too large after 6,000 steps).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowmem.kernels.exact import random_bits


class Dither(NamedTuple):
    """Which random numbers round a state's codes: those of `seed` from the index `offset` on.

    The index of a value is its place in the whole parameter, so that a part of it, or a shard, draws what the whole
    would. The seed is another one at each step.
    """

    seed: int
    offset: int = 0

    def thresholds(self, start: int, stop: int, signed: bool, device: torch.device) -> Tensor:
        """A number in (0, 1), fp32, for each of the values from `start` to `stop`: odd multiples of 2**-24.

        Both moments of a parameter take theirs from one word a value: the unsigned ones from its halves exchanged.
        """
        words = random_bits(self.seed, self.offset + start, self.offset + stop, device)
        if not signed:
            words = words.bitwise_left_shift(16).bitwise_or_(words.bitwise_right_shift(16).bitwise_and_(0xFFFF))
        return words.bitwise_right_shift_(9).bitwise_and_(0x7FFFFF).float().add_(0.5).mul_(2.0**-23)


def round_between(
    x: Tensor, nearest: Tensor, values: Callable[[Tensor], Tensor], top: int, u: Tensor, signed: bool
) -> Tensor:
    """The code of the value below x or of the one above, at random.

    ```python
    up = x - low > u * (high - low)                                  # signed: E[value] = x
    up = log(x / low) > u * log(high / low)                          # unsigned: E[log(value)] = log(x)
    ```
    The logarithms are taken as log(b / a) = 2 (b - a) / (b + a), off by (b / a - 1)**3 / 12: of no account between two
    codes of 8 bits, and a comparison of products, which every device rounds alike.

    Args:
        x: fp32, in units of the scale; from the least value to the greatest.
        nearest: int32, the code whose value is nearest to x, or next to that one.
        values: the values of codes 0 to `top`, ascending, as a function: a look-up.
        u: from `Dither.thresholds`.
    """
    near = values(nearest)
    above = near > x
    other = values(torch.where(above, nearest - 1, nearest + 1).clamp_(0, top))
    low, high = torch.where(above, other, near), torch.where(above, near, other)
    rest, gap = x - low, (high - low).mul_(u)
    up = rest > gap if signed else rest.mul_(low + high) > gap.mul_(low + x)
    return (nearest - above.int()).add_(up.int()).clamp_(0, top)
