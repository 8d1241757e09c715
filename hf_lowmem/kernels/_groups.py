"""Codes of groups on a device: E4M3 and int8, to the nearest and at random, and the scale of a group.

The formulas are those of hf_lowmem/kernels/quantize/reference.py. E4M3 is integer arithmetic wherever a device has no
such type; NVIDIA's GPUs from sm_89 on have an instruction for two values, which by PTX's definition rounds and
saturates in the same way. What it does to all 2**32 floats only such a device can show.
"""

# pyright: reportOperatorIssue=false, reportArgumentType=false
# It reads the Python, not the language that @triton.jit makes of it.

import triton
import triton.language as tl

from hf_lowmem.kernels._device import (
    INTERPRETED,
    bits_of,
    cuda_arch,
    div,
    from_bits,
    magnitude,
    random_word,
    reciprocal,
    round_bf16_up,
)


@triton.jit
def load_codes(ptr, mask):
    """Codes; zero where not `mask`, which is None where all are there."""
    return tl.load(ptr) if mask is None else tl.load(ptr, mask=mask, other=0)


@triton.jit
def e4m3_nearest(y):
    """fp32, no nan -> E4M3 bits, uint8; to the nearest, ties to even, beyond 448 to 448. Reference: `e4m3_codes`.

    Adding 1.5 * 2**20 times the power of two below |y| (at least 2**-6, the least normal) leaves |y| rounded to its
    first four digits in the lowest bits: codes of the binade from 8, or with the carry 16, and subnormals from 0. The
    binade's own bits, 8 codes each, are added to that.
    """
    if not INTERPRETED and cuda_arch() >= 89:
        codes = y.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = bits_of(y)
        size = tl.minimum(from_bits(bits & 0x7FFFFFFF), 448.0)
        binade = tl.maximum(bits_of(size) & 0x7F800000, 0x3C800000)
        magic = binade + 0x0A400000  # 1.5 * 2**20 times as large
        code = bits_of(size + from_bits(magic)) - magic + (binade >> 20) - 968  # 0x3C800000 >> 20
        codes = (code | ((bits >> 24) & 0x80)).to(tl.uint8)
    return codes


@triton.jit
def e4m3_stochastic(y, word):
    """Like `e4m3_nearest`, but rounded up with the remainder's probability, by the lower 20 bits of `word` (uint32)."""
    bits = bits_of(y)
    noise = word & 0xFFFFF
    least_normal = 0x3C800000
    size = tl.minimum(from_bits(bits & 0x7FFFFFFF), 448.0)
    small = bits_of(size)
    normal = ((small + noise) >> 20) - 960  # (127 - 7) << 3: the exponent's bias
    below = tl.minimum(size, 0.015625)  # a larger one would not fit the integer
    subnormal = ((below * 536870912.0).to(tl.int32).to(tl.uint32) + noise) >> 20  # 2**29
    return (tl.where(small < least_normal, subnormal, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def e4m3_halves(codes):
    """E4M3 bits, uint8 -> fp32 of 2**-8 their value, exact for all 256. Reference: `e4m3_halves` of exact.py.

    Shifted by 7 it is the fp16 of 2**-8 its value, subnormals included, and fp16 is widened exactly everywhere. An
    fp32 made by shifting would be a denormal for them, which a device may flush.
    """
    wide = codes.to(tl.int8, bitcast=True).to(tl.int16)  # the sign twice: the lower copy is masked away
    halves = ((wide << 7) & -0x4001).to(tl.float16, bitcast=True).to(tl.float32)
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), halves)


@triton.jit
def e4m3_decode(codes):
    """E4M3 bits, uint8 -> fp32, exact for all 256."""
    if not INTERPRETED and cuda_arch() >= 89:
        x = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        x = e4m3_halves(codes) * 256.0
    return x


@triton.jit
def int8_values(codes):
    """int8 -> fp32, exact: made unsigned, it is in the lowest bits of 2**23. A conversion has few lanes."""
    bits = (codes.to(tl.uint8, bitcast=True) ^ 0x80).to(tl.uint32) | 0x4B000000
    return from_bits(bits) - 8388736.0  # 2**23 + 128


@triton.jit
def int8_nearest(y):
    """fp32 within [-127, 127] -> the nearest integer, ties to even, int8."""
    return bits_of(y + 12582912.0).to(tl.int8)  # 1.5 * 2**23, whose lowest byte is zero


@triton.jit
def int8_stochastic(y, word):
    """fp32 within [-127, 127] -> int8, up with the probability of the remainder, to the lower 24 bits of `word`."""
    return (((y * 16777216.0).to(tl.int32) + (word & 0xFFFFFF).to(tl.int32)) >> 24).to(tl.int8)


@triton.jit
def quantize_groups(
    x,
    index,
    k0,
    k1,
    E4M3: tl.constexpr,
    TOP: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """fp32 (groups, group) -> codes (uint8 or int8) of that shape, and scales (groups,), fp32 with the bits of a bf16.

    The bits of quantize/reference.py, whose `Groups` has TOP, LEAST and MOST. `index`: of each value among all, and the
    keys: for its random word.
    """
    largest = tl.max(magnitude(x), 1)
    finite = largest < 0x7F800000
    scale = div(from_bits(tl.where(finite, largest, 0).to(tl.uint32)), TOP)
    scale = round_bf16_up(tl.minimum(tl.maximum(scale, LEAST), MOST))
    y = tl.where(finite[:, None], x, 0.0) * reciprocal(scale)[:, None]
    if E4M3:
        codes = e4m3_stochastic(y, random_word(index, k0, k1)) if STOCHASTIC else e4m3_nearest(y)
    else:
        y = tl.minimum(tl.maximum(y, -TOP), TOP)
        codes = int8_stochastic(y, random_word(index, k0, k1)) if STOCHASTIC else int8_nearest(y)
    return codes, tl.where(finite, scale, float("nan"))


@triton.jit
def e4m3_groups(x, index, k0, k1, MOST: tl.constexpr, STOCHASTIC: tl.constexpr):
    """`quantize_groups` of e4m3: fp32 (groups, 128); MOST: `GROUPS["e4m3"].most(dtype)`."""
    codes, scale = quantize_groups(x, index, k0, k1, True, 448.0, 6.018531076210112e-36, MOST, STOCHASTIC)  # 2**-117
    return codes, scale
