"""4-bit states: two values a byte (the aim of Li et al., arXiv 2309.01507, with maps of our own).

Sixteen codes forgive nothing, so the two kinds of state have little in common:

- **A first moment** takes the squares of even steps, both signs: -(7/8)**2 ... 0 ... (8/8)**2 of its block's extreme.
  As in `int8` the scale has the extreme's sign, so that the extreme is exact and the sixteenth code is not wasted.
  The paper's map, the dynamic one of 4 bits, spends six codes below a tenth of the extreme and has gaps of a fifth of
  it above: on moments of real training its error in the update is a quarter to a third larger.
- **A second moment** takes fifteen values in geometric progression from the block's smallest to its largest, and code
  0 for an exact zero. The paper excludes zero from an even map, 1/16 to 16/16; a floor of 1/16 is far above most of a
  block, and in a state of zeros (before the first step, in a row of an embedding that no token has used) it would
  have no way to say zero. Here every non-zero value keeps its order of magnitude: what counts is the *relative*
  error of sqrt(v). The error in the update is a sixth to an eighth of the even map's (`scripts/bench/codecs.py`).

A first moment has one extreme in bf16 for each half of a block of 128. A second moment has its largest and its smallest
value, in fp32: it moves by less than a step of a bf16.

**Rounded at random**, a second moment of four bits is unbiased as one of eight is. A first moment is not: with steps as
wide as its values, numbers that are right on average are so noisy that the updates of small values grow. Rounding to
nearest loses what is small beside the steps. So the middle half of each step is rounded at random, and the rest to the
nearest: over 20,000 steps updates of fp32's size, within 3 %, where beta1 is 0.9 (`scripts/bench/long_run.py`). Not for
an average of more steps: take eight bits for Lion's momentum.
"""

from typing import ClassVar

import torch
from torch import Tensor

from hf_lowmem.codecs.blocks import BlockCodec, ErrorBound
from hf_lowmem.kernels.codecs.blocks import mark_nonzero, smallest_nonzero
from hf_lowmem.kernels.codecs.dither import thresholds
from hf_lowmem.kernels.codecs.tables import DeviceTable
from hf_lowmem.kernels.exact import BF16_MAX, FLOAT_MAX, round_bf16

SQUARES = 64.0  # of the largest step, 8
TOP = 15  # the code of a second moment's largest value; its smallest has code 1
# The widest progression of a second moment: a factor of 4 a step, so at most of 2 in v and 1.42 in the update. What is
# still smaller is raised to its end: the update becomes too small, never too large.
MOST_OCTAVES = 28.0
MIDDLE = 0.5  # of a first moment's step, where it is rounded at random


def square_values() -> Tensor:
    """x / scale of every code of a first moment, fp32 (16,): codes are integers from -7 to 8, modulo 16."""
    steps = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, -7, -6, -5, -4, -3, -2, -1], dtype=torch.float32)
    return steps * steps.abs() / SQUARES


SQUARE_TABLE = DeviceTable(square_values)


class Int4Codec(BlockCodec):
    """`int4`: 1/2 + 4/128 = 0.531 bytes a value, unsigned 1/2 + 8/128 = 0.5625. `codes` (two a byte, flat) and two
    bf16, or fp32, of each block of 128.

    ```python
    # signed; one scale for each half of a block
    scale = bf16(x[argmax(abs(x))])
    codes = argmin(abs(x / scale - map)),  map = sign(i) * (i / 8)**2,  i = -7 ... 8
    x = map[codes] * scale
    # unsigned
    a, b = max(x), max(min(x[x > 0]), a / 2**28)
    codes = where(x > 0, 15 - clamp(round(14 * log(a / x) / log(a / b)), 0, 14), 0)
    x = where(codes > 0, a * (b / a)**((15 - codes) / 14), 0)
    ```
    Error: signed half a gap, at most 7.5/64 of the half's extreme, and 15/64 for a value as large as the extreme but
    of the other sign, whose codes end at -49/64. Unsigned a factor of (a / b)**(1/28), 1.41 for a block 14 octaves
    wide; never more than 2, but for what is under 2**-28 of the largest and is raised to that.

    The extremes of a block decode to a and b themselves: encoding again changes nothing.

    For the half of an 8-bit state that it saves, the error in the update is 11 to 16 times as large, nearly all of it
    the first moment's: a tenth to a quarter of the update. Where the state is not what fills the memory, take 8 bits;
    or 4 for the second moment alone ("int8_softsign,int4").
    """

    name: ClassVar[str] = "int4"
    block: ClassVar[int] = 128
    bits: ClassVar[int] = 4
    scalars: ClassVar[dict[str, torch.dtype]] = {"scale": torch.bfloat16, "scale2": torch.bfloat16}
    unsigned_scalars: ClassVar[dict[str, torch.dtype]] = {"scale": torch.float32, "scale2": torch.float32}
    # Times 2**-28 or 1/64 still a normal fp32.
    smallest: ClassVar[float] = 2.0**-97
    # Nearest of (i/8)**2 and ((i+1)/8)**2: off by (i + 1/2) / 64 at a midpoint of (i**2 + i + 1/2) / 64. From i = 4 on
    # that is less than 15/64 of the value, so i = 3 sets the absolute part. 2**-8: the rounding of the scale.
    signed_bound: ClassVar[ErrorBound] = ErrorBound(15 / 64 + 2.0**-8, 3.5 / 64 * (1 + 2.0**-7))
    # Half a step of 2 octaves, upwards. 2**-12: fp32's logarithm, 2**-20 of at most 97 + 28 octaves.
    unsigned_bound: ClassVar[ErrorBound] = ErrorBound(2 ** (MOST_OCTAVES / 28) - 1 + 2.0**-12, 2.0**-MOST_OCTAVES)

    def tables(self, signed: bool) -> tuple[DeviceTable, ...]:
        return (SQUARE_TABLE,) if signed else ()

    def encode_rows(self, x: Tensor, signed: bool, words: Tensor | None) -> tuple[Tensor, ...]:
        u = None if words is None else thresholds(words)
        return self._encode_squares(x, u) if signed else self._encode_progression(x, u)

    def decode_rows(self, codes: Tensor, scalars: tuple[Tensor, ...], signed: bool) -> Tensor:
        first, second = (scalar.float()[:, None] for scalar in scalars)
        if signed:
            steps = SQUARE_TABLE.on(codes.device).index_select(0, codes.view(-1).int())
            return steps.view(-1, 2, 64).mul_(torch.stack((first, second), 1)).view(codes.shape)
        largest, smallest = first.clamp_(min=self.smallest), second  # init's zeros decode to zeros
        octaves = largest.div(smallest.clamp_(min=self.smallest * 2.0**-MOST_OCTAVES)).log2_()
        exponent = codes.float().sub_(TOP).mul_(octaves.div_(TOP - 1))
        values = exponent.exp2_().mul_(largest)
        # The ends exactly, or encoding again would find others.
        values = torch.where(codes == 1, smallest, torch.minimum(torch.maximum(values, smallest), largest))
        return values.mul_(codes.clamp(max=1))

    def _encode_squares(self, x: Tensor, u: Tensor | None) -> tuple[Tensor, ...]:
        halves = x.reshape(-1, 64)
        high, low = halves.amax(1), halves.amin(1).neg_()
        scale = round_bf16(torch.maximum(high, low).clamp_(self.smallest, BF16_MAX))
        # A half of values under `smallest` may decode to zeros: its sign must not depend on them.
        scale = torch.where((high >= low) | (low < self.smallest), scale, -scale)
        q = halves.div(scale[:, None])
        # Midpoints of squares are at (i**2 + i + 1/2) / 64 = ((i + 1/2)**2 + 1/4) / 64: less 1/4, the root rounds to
        # the nearest exactly.
        squares = q.abs().mul_(SQUARES)
        if u is None:
            steps = squares.sub_(0.25).clamp_(min=0).sqrt_().round_()
        else:
            below = squares.sqrt().floor_()
            gap = u.view(-1, 64).sub(0.5).mul_(MIDDLE).add_(0.5).mul_(below.mul(2).add_(1))
            steps = below + (squares - below.square() > gap)
        codes = steps.copysign_(q).clamp_(-7, 8).to(torch.int8).view(torch.uint8).bitwise_and_(15)
        return codes.view(x.shape), *scale.view(-1, 2).unbind(1)

    def _encode_progression(self, x: Tensor, u: Tensor | None) -> tuple[Tensor, ...]:
        largest = x.amax(1).clamp_(self.smallest, FLOAT_MAX)
        smallest = smallest_nonzero(x)
        smallest = torch.minimum(torch.maximum(smallest, largest * 2.0**-MOST_OCTAVES), largest)
        octaves = largest.div(smallest).log2_()
        steps = torch.where(octaves > 0, (TOP - 1) / octaves, 0)  # an octave; 0: all values have the code TOP
        # The clamp spares log2 its slow path for zero, and keeps infinities out of 0 * inf.
        ratio = x.div(largest[:, None]).clamp_(min=2.0**-100).log2_()
        place = ratio.mul_(steps[:, None])
        place = place.round_() if u is None else place.add_(u).floor_()
        codes = place.clamp_(-(TOP - 1), 0).add_(TOP).to(torch.uint8)
        return codes.mul_(mark_nonzero(x)), largest, smallest
