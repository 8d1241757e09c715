"""Blockwise 8-bit states with the dynamic map (Dettmers et al., arXiv 2110.02861, section 2 and appendix).

A block of 256 values is divided by its extreme and each quotient is replaced by the nearest of 256 fixed
numbers in [-1, 1] (or [0, 1]). The map is a float with a *dynamic* exponent: seven decades from 1 down to
1e-7, each with half as many fractions as the decade above, so large values are exact to 0.7 % and small
ones still have an order of magnitude. A linear map would spend its codes evenly and lose everything under
1/255 of the extreme.

Two departures from the authors' code:
- **The scale has a sign.** The signed map holds +1 but not -1 (256 is even), so a block whose extreme is
  negative would store it as -0.993, and every step would shrink it again by 0.7 %. Here the scale is the
  extreme *with its sign*: the extreme always becomes +1 and is exact. It costs nothing, as an fp32 has the
  bit anyway.
- **The second moment has a floor.** A positive value that would round to 0 takes the smallest positive code;
  a v of exactly 0 beside an m that is not makes Adam step by m / eps.
"""

from typing import ClassVar

import torch

from hf_lowmem.codecs.blocks import ErrorBound, KernelCodec
from hf_lowmem.kernels.codecs.reference import SMALLEST_SCALE
from hf_lowmem.kernels.codecs.tables import dynamic_map

__all__ = ["Int8Codec", "dynamic_map"]


class Int8Codec(KernelCodec):
    """`int8`: 1 + 4/256 = 1.016 bytes a value. `codes` and the signed extreme of each block of 256, fp32.

    ```python
    scale = x[argmax(abs(x))]                                  # per block
    codes = argmin(abs(x / scale - map))                       # to the nearest
    codes = where((x != 0) & ~signed, maximum(codes, 1), codes)
    x = map[codes] * scale
    ```
    Error: in the top decade the map's gaps are 0.9/64 (unsigned 0.9/128), and half a gap is 7.03 % (3.52 %)
    of the smallest value there; under it half a gap is at most 0.45/32 (0.45/64) of a tenth of the extreme,
    and shrinks fivefold a decade. The gap across 0.1 (0.0986 to 0.1070) is inside both. The floor code
    stands for 3.25e-7.

    Good for a first moment; for a second one see `fp8_expand`: here a v under 1e-6 of its block's largest keeps
    no digit and is raised to the floor, so 1/sqrt(v) is finite but may be a hundredfold too small.
    """

    name: ClassVar[str] = "int8"
    block: ClassVar[int] = 256
    scalars: ClassVar[dict[str, torch.dtype]] = {"scale": torch.float32}
    # The smallest code (3.25e-7) times this is still a normal fp32, so no device flushes it to zero.
    smallest: ClassVar[float] = SMALLEST_SCALE
    signed_bound: ClassVar[ErrorBound] = ErrorBound(relative=4.5 / 64, absolute=0.045 / 32)
    unsigned_bound: ClassVar[ErrorBound] = ErrorBound(relative=4.5 / 128, absolute=0.045 / 64)

    def zero_code(self, signed: bool) -> int:
        return 127 if signed else 0
