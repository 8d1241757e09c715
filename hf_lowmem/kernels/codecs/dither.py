"""Codes rounded at random, so that a state which is an average stays unbiased over any number of steps.

A moment changes by a part 1 - beta of itself a step: at beta2 = 0.999 by a tenth of a per cent, a small fraction of the
distance between two 8-bit codes. Rounded to the nearest code such a change is lost, each time, and the average never
moves down again. Rounded up or down at random, with probabilities that make the expectation exact *given what is
encoded*, it arrives on average, however small it is. Nothing has to be known of the past, so the promise holds for any
beta and any contents of a block.

**What is exact on average** depends on what the state is for. A first moment adds to the weights: its value is. A
second moment divides them: its logarithm is. Rounded that way, E[log v] moves as it would without rounding; where v
neither rises nor falls that says E[g**2 / v - 1] = 0, so the mean of 1 / v, and with it the size of the update, is the
right one whatever the distance of two codes. Were it the mean of v that is exact, 1 / v would be too large by half that
distance. The price is a mean of v that is too large instead, by
as much: scripts/bench/long_run.py measures both.

**Scales** of second moments are exact, fp32. One that is rounded up to bf16 would be unbiased too, but jumps by 0.4 to
0.8 % where the values change by 0.1 %, and each jump rounds a whole block anew. First moments have noise enough of
their own, and theirs are rounded up, never to nearest: a scale below the block's largest value would cut it.

**Steps go in pairs**: the second one has the numbers of the first, mirrored, 1 - u for u. Where a moment moves by many
codes a step, independent numbers have twice the variance of rounding to nearest; half of it is what a threshold does on
average, 1/2 - u, and that is taken back a step later, before it has weighed on the weights. Longer sequences of even
coverage (a threshold that turns by the golden ratio at each step) have still less noise, but nothing keeps what they
round from falling into step with them, and under scales that move they resonated. A pair has no memory.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowmem.kernels.exact import fma, grouped_bits, rotate_half


def even(seed: int) -> int:
    """The seed of the pair: without its lowest bit."""
    return seed & ~1


def seed_of(pair: int, step: int) -> int:
    """The seed of a step, from that of the pair, step // 2."""
    return even(pair) | (step & 1)


class Dither(NamedTuple):
    """Random numbers that round a state's codes: those of `seed` from the index `offset` on.

    The index of a value is its place in the whole parameter, so that a part of it, or a shard, draws what the whole
    would. The seed is another one at each step, but for two steps of a pair, whose seeds differ in the lowest bit: an
    odd one has the numbers of the even one below it, mirrored. `seed_of` makes them.
    """

    seed: int
    offset: int = 0

    def words(self, start: int, stop: int, device: torch.device) -> Tensor:
        """32 random bits for each of the values from `start` to `stop`, int32; 16 of them are its own."""
        words = grouped_bits(even(self.seed), self.offset + start, self.offset + stop, device)
        return words.bitwise_not() if self.seed & 1 else words

    def of_state(self, start: int, stop: int, signed: bool, device: torch.device) -> Tensor:
        """`words` for a state's encoder. Both moments of a parameter take theirs from the same bits, the unsigned ones
        with the halves exchanged; what decides comes first in a word."""
        words = self.words(start, stop, device)
        return words if signed else rotate_half(words)

    def thresholds(self, start: int, stop: int, signed: bool, device: torch.device) -> Tensor:
        """A number in (0, 1), fp32, for each of the values from `start` to `stop`."""
        return thresholds(self.of_state(start, stop, signed, device))


def thresholds(words: Tensor) -> Tensor:
    """A number in (0, 1), fp32, from each of the words: odd multiples of 2**-24."""
    return words.bitwise_right_shift(9).bitwise_and_(0x7FFFFF).float().add_(0.5).mul_(2.0**-23)


def round_up(q: Tensor, code: Tensor, places: Tensor, words: Tensor) -> Tensor:
    """The code of the value below q, or the next one, at random.

    ```python
    p = (q - low) / (high - low)                                     # signed: E[value] = q
    p = log(q / low) / log(high / low)                               # unsigned: E[log(value)] = log(q)
    ```
    p, and the code that it is added to, are one polynomial of the second degree, an entry of `places`. The logarithm's
    is off by less than (high / low - 1)**3 / 100 of the gap, below the middle upwards and above it downwards: of no
    account between two codes of 8 bits.

    Args:
        q: fp32, in units of the scale.
        code: int32, the entry: of the code whose value is the last that is not above q.
        places: of tables.py.
        words: of `Dither.of_state`.
    """
    start, slope, square, middle = places.index_select(0, code.view(-1)).view(*q.shape, 4).unbind(-1)
    d = q - middle
    return code_at(fma(d, fma(d, square, slope), start), words)


def code_at(place: Tensor, words: Tensor) -> Tensor:
    """The code below a place, or the next one, by the upper 16 bits of each word: int32.

    As a float from 512 to 1024 a place has 14 binary places, which are rounded to the nearest; the code is then up in
    exactly that many cases of 2**14.
    """
    return _third_byte(place.view(torch.int32).bitwise_left_shift(2), words)


def cell_code_at(place: Tensor, words: Tensor, nonzero: Tensor | None) -> Tensor:
    """`code_at` of a float from 128 to 256, with 16 binary places; 0 where `nonzero`, int32, is."""
    bits = place.view(torch.int32)
    return _third_byte(bits.clone() if nonzero is None else bits * nonzero, words)


def _third_byte(bits: Tensor, words: Tensor) -> Tensor:
    noise = words.bitwise_right_shift(16).bitwise_and_(0xFFFF)
    return bits.add_(noise).bitwise_right_shift_(16).bitwise_and_(0xFF)


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
