"""8-bit integers of a companded value: a first moment, and a second one by its root.

Companding is what a telephone line does: squeeze the large values by a smooth function, cut the result into even
steps, undo the function. The function is the softsign, scaled so that 1 stays 1:

    f(u) = (1 + c) u / (|u| + c),        its inverse  u = c y / (1 + c - |y|)

on u = x / (largest |x| of the block). The step of u is (|u| + c)**2 / (127 c (1 + c)): fine near zero and coarse at
the extreme, without the jumps of the dynamic map (`int8`), whose steps grow tenfold at each power of ten. The idea of
a softsign for the first moment and of a root for the second is FlashOptim's, there with c = 1. What decides about a
codec of moments is the update m / sqrt(v), not m itself, and there the small values of a block weigh as much as
the large ones. On moments of real training (`scripts/bench/codecs.py`) c = 0.15 has 0.87 of c = 1's error in a model
trained from nothing, and a half and a third of it in the layers and the embedding of one that is fine-tuned.

The second moment takes the root first: half the range in octaves, and sqrt(v) is what the update divides by.

A first moment takes two divisions and no look-up to encode: next to `fp8` the cheapest codec here. Those of a second
one are looked up, because the root of a CPU is not correctly rounded and would differ from that of a GPU.
"""

from typing import ClassVar

import torch

from hf_lowmem.codecs.blocks import ErrorBound, KernelCodec
from hf_lowmem.kernels.codecs.reference import SMALLEST_SCALE
from hf_lowmem.kernels.codecs.tables import SOFTNESS, STEPS


def bound(steps: int, power: int) -> ErrorBound:
    """Half a step in y moves u = c y / (1 + c - y) by at most (|u| + c)**2 h / (c (1 + c)), h = 1 / (2 steps).

    As a part of u that is largest at both ends of c**2 <= u <= 1, where (u + c)**2 / u = (1 + c)**2: it is
    (1 + c) h / c there, and under c**2 the error is at most what it is at c**2. For `power` = 2 (x = u**2) the
    relative error doubles. Slack: the upper neighbour's own (|u| + c) is larger by 1 + h / c, the square adds as much
    again, and the scale may be a bf16, above the largest value by up to 2**-7.
    """
    c, half = SOFTNESS, 0.5 / steps
    relative = power * (1 + c) * half / c * (1 + half / c) ** power
    return ErrorBound(relative, relative * c ** (2 * power) * (1 + 2.0**-7))


class SoftsignCodec(KernelCodec):
    """`int8_softsign`: 1.031 bytes a value, unsigned 1.0625. `codes` and the largest |x| of each block of 64, in bf16
    or, unsigned, in fp32.

    ```python
    scale = bf16_up(max(abs(x)))                               # per block; unsigned: fp32
    u = x / scale
    codes = round(127 * 1.15 * u / (abs(u) + 0.15))            # signed, int8 in a byte
    codes = round(255 * 1.15 * sqrt(u) / (sqrt(u) + 0.15))     # unsigned
    codes = where((x != 0) & ~signed, maximum(codes, 1), codes)
    y = codes / 127                                            # unsigned: / 255
    x = scale * 0.15 * y / (1.15 - abs(y))                     # unsigned: scale * (...)**2
    ```
    Error: signed 3.1 % down to 0.0225 of the block's largest, under that 0.07 % of the largest; unsigned 3.2 % down to
    5e-4 of the largest, under that 1.6e-5 of it. The floor code of a second moment stands for 2.6e-7 of the largest.

    The scale is rounded before it is used, so a block's largest value takes the largest code, decodes to the scale
    itself, and encoding again changes nothing. Up, as a scale below it would cut it, each time. A second moment moves
    by less than a step of a bf16, so its scale is an fp32: see `fp8_expand`.

    Blocks of 64, a half of what `fp8` has: the rows of an embedding are far apart in size, and a block that holds the
    end of one and the beginning of the next rounds the smaller one's moments to zero. 64 divides the usual widths.

    Recommended for a first moment; not where many blocks reach over two rows of very different size (a width that is no
    multiple of 64). As a second moment its mean error is that of `fp8_expand` or less, its worst one larger: a v under
    3e-7 of its block's largest is raised, and its update becomes too small (never too large).
    """

    name: ClassVar[str] = "int8_softsign"
    block: ClassVar[int] = 64
    scalars: ClassVar[dict[str, torch.dtype]] = {"scale": torch.bfloat16}
    unsigned_scalars: ClassVar[dict[str, torch.dtype]] = {"scale": torch.float32}
    # The smallest codes stand for 1.0e-3 and 2.6e-7: times this still a normal fp32.
    smallest: ClassVar[float] = SMALLEST_SCALE
    signed_bound: ClassVar[ErrorBound] = bound(STEPS[True], 1)
    unsigned_bound: ClassVar[ErrorBound] = bound(STEPS[False], 2)
