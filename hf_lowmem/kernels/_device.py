"""Device functions that the Triton kernels share: 8-bit codes, bf16, random bits, exact division, all by plain means.

Two rules make a kernel give the bits of its reference on every device, and in Triton's interpreter:

- **Casts to fp8 and bf16 are integer operations on the bits.** Triton refuses fp8 casts below sm_89, and its
  interpreter loses carries and subnormals in fp8 and rounds bf16 halves upwards. Integers are the same everywhere.
- **Floats are combined by single, correctly rounded operations only**: + - * as they stand (launch with
  `enable_fp_fusion=False`, or two of them become one FMA), `fma`, `div` and `sqrt` from here, as `/` and `tl.sqrt` are
  approximations on a GPU. Maxima are taken over `magnitude(x)`, whose integers have the order of the floats, with
  inf and nan above them: `tl.max` of floats drops a nan or keeps it depending on the device.

The formulas are those of hf_lowmem/kernels/quantize/reference.py. Beside the `triton.py` of a kernel, this is the one
module that imports triton.
"""

# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# It reads the Python, not the language that @triton.jit makes of it.

import os

import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def bits_of(x):
    """fp32 -> its bits, uint32."""
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def from_bits(bits):
    """uint32 -> the fp32 of these bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def magnitude(x):
    """fp32 -> the bits of |x|, int32. Finite values are below 0x7F800000, an inf is that, a nan is above."""
    return (bits_of(x) & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def div(x, y):
    """x / y in fp32, correctly rounded. Reference: `x / y` of tensors; `divide` of exact.py for a number."""
    return tl.div_rn(x, y)


@triton.jit
def sqrt(x):
    """sqrt(x) in fp32, correctly rounded. Reference: `sqrt` of exact.py, as torch's is not."""
    return tl.sqrt_rn(x)


@triton.jit
def clip(x, top):
    """x within [-top, top]; a nan stays one."""
    return tl.where(x > top, top, tl.where(x < -top, -top, x))


@triton.jit
def round_bf16(x):
    """fp32 -> the nearest bf16, ties to even, as fp32; overflows to inf, a nan stays one."""
    bits = bits_of(x)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    # The sum carries some nans into the sign; the quiet nan of the same sign does not.
    return from_bits(tl.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits & 0x80000000) | 0x7FC00000, rounded))


@triton.jit
def round_bf16_up(x):
    """fp32, finite -> the next bf16 that is no smaller in magnitude, as fp32."""
    return from_bits((bits_of(x) + 0xFFFF) & 0xFFFF0000)


@triton.jit
def as_bf16(x):
    """fp32 that is a bf16's value already (round_bf16) -> that bf16: drops the lower half of the bits."""
    return (bits_of(x) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def widen(x):
    """bf16, fp16, fp32 or fp64 -> fp32. Exact but for fp64, which is rounded to the nearest."""
    if x.dtype == tl.bfloat16:
        y = from_bits(x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def load_fp32(ptr, mask):
    """Values of any float dtype as fp32; zero where not `mask`."""
    return widen(tl.load(ptr, mask=mask, other=0.0))


@triton.jit
def store_rounded(ptr, x, mask):
    """fp32 written as the pointer's float dtype, to the nearest, ties to even.

    To bf16 by the device's own conversion, one instruction for two values where `round_bf16` takes six for one; the
    interpreter's is wrong.
    """
    if INTERPRETED and ptr.dtype.element_ty == tl.bfloat16:
        tl.store(ptr, as_bf16(round_bf16(x)), mask=mask)
    else:
        tl.store(ptr, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def e4m3_nearest(y):
    """fp32, no nan -> E4M3 bits, uint8; to the nearest, ties to even, beyond 448 to 448. Reference: `e4m3_codes`.

    Adding 1.5 * 2**20 times the power of two below |y| (at least 2**-6, the least normal) leaves |y| rounded to its
    first four digits in the lowest bits: codes of the binade from 8, or with the carry 16, and subnormals from 0. The
    binade's own bits, 8 codes each, are added to that.
    """
    bits = bits_of(y)
    size = tl.minimum(from_bits(bits & 0x7FFFFFFF), 448.0)
    binade = tl.maximum(bits_of(size) & 0x7F800000, 0x3C800000)
    magic = binade + 0x0A400000  # 1.5 * 2**20 times as large
    code = bits_of(size + from_bits(magic)) - magic + (binade >> 20) - 968  # 0x3C800000 >> 20
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


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
    return e4m3_halves(codes) * 256.0


@triton.jit
def round_nearest(y):
    """fp32, |y| <= 2**22 -> the nearest integer, ties to even, int32."""
    return (y + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000  # 1.5 * 2**23 and its bits


@triton.jit
def int8_nearest(y):
    """fp32 within [-127, 127] -> the nearest integer, ties to even, int8."""
    return bits_of(y + 12582912.0).to(tl.int8)  # 1.5 * 2**23, whose lowest byte is zero


@triton.jit
def int8_stochastic(y, word):
    """fp32 within [-127, 127] -> int8, up with the probability of the remainder, to the lower 24 bits of `word`."""
    return (((y * 16777216.0).to(tl.int32) + (word & 0xFFFFFF).to(tl.int32)) >> 24).to(tl.int8)


@triton.jit
def random_word(index, k0, k1):
    """32 random bits of each index (any integer, modulo 2**32), uint32. Reference: `random_bits(seed, ...)`.

    k0, k1: `seed_keys(seed)` of quantize/reference.py, int32 arguments of the kernel; name them in
    `@triton.jit(do_not_specialize=["k0", "k1"])`, or every sixteenth seed compiles the kernel again.
    """
    h = index.to(tl.uint32) ^ k0.to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x7FEB352D + k1.to(tl.uint32)
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def divide_rows(x, scale):
    """fp32 x (rows, n) / scale (rows,) with bf16 values, correctly rounded for quotients from 2**-40 to 2**20.

    Five operations a value where ptxas makes fifteen of a division. q = x * (1 / scale) is off by 2 units in the last
    place at most; the remainder x - q * scale is exact in an FMA, and adding its quotient, rounded once, leaves an
    error of 2**-46. That rounds as the true quotient does, which is never as close as 2**-33 to the middle m of two
    fp32: scale having 8 digits, x and m * scale are multiples of 2**-31 of their size, and cannot be equal, as m has
    25 digits and x 24. (Tried on all 2**23 x and 2**7 scales.)

    Rows of small scales are lifted by 2**64 first, so that no remainder is a denormal.
    """
    lift = tl.where(scale < 8.673617379884035e-19, 18446744073709551616.0, 1.0)  # 2**-60, 2**64
    scale = (scale * lift)[:, None]
    inverse = div(1.0, scale)
    x = x * lift[:, None]
    q = x * inverse
    q = fma(fma(-q, scale, x), inverse, q)
    return from_bits(bits_of(q) | (bits_of(x) & 0x80000000))  # the remainder of a -0 is +0


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
    y = divide_rows(tl.where(finite[:, None], x, 0.0), scale)
    if E4M3:
        codes = e4m3_stochastic(y, random_word(index, k0, k1)) if STOCHASTIC else e4m3_nearest(y)
    else:
        y = tl.minimum(tl.maximum(y, -TOP), TOP)
        codes = int8_stochastic(y, random_word(index, k0, k1)) if STOCHASTIC else int8_nearest(y)
    return codes, tl.where(finite, scale, float("nan"))


@triton.jit
def sum_pairs(x, LOG2: tl.constexpr):
    """(2**LOG2,) fp32 -> its sum: neighbours first, then neighbouring sums. Reference: rmsnorm's `sum_pairs`.

    `tl.sum` over everything would add in an order of the layout's choosing; over two values there is but one.
    """
    for i in tl.static_range(LOG2):
        x = tl.sum(tl.reshape(x, (1 << (LOG2 - 1 - i), 2)), axis=1)
    return tl.sum(x, axis=0)


@triton.jit
def sum_row_pairs(x, LOG2: tl.constexpr, COLUMNS: tl.constexpr):
    """(2**LOG2, COLUMNS) fp32 -> the sums over the rows, (COLUMNS,), in the order of `sum_pairs`."""
    for i in tl.static_range(LOG2):
        x = tl.sum(tl.reshape(x, (1 << (LOG2 - 1 - i), 2, COLUMNS)), axis=1)
    return tl.reshape(x, (COLUMNS,))


@triton.jit
def exp(x):
    """e**x, fp32, relative error below 1.8 * 2**-24; inf above 88.4, 4.5e-38 below -86. Reference: glu's `exp`."""
    x = tl.where(x > 89.0, 89.0, tl.where(x < -86.0, -86.0, x))
    n = round_nearest(x * 1.4426950408889634)
    m = n.to(tl.float32)
    r = (x - m * 0.693359375) - m * -0.00021219444005469057
    p = r * 0.0001984126984126984 + 0.001388888888888889
    p = p * r + 0.008333333333333333
    p = p * r + 0.041666666666666664
    p = p * r + 0.16666666666666666
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    return p * from_bits(((n + 127) << 23).to(tl.uint32, bitcast=True))


@triton.jit
def round_as(ptr, x):
    """fp32 rounded to the pointer's float dtype, to the nearest, ties to even, still as fp32."""
    if ptr.dtype.element_ty == tl.bfloat16:
        y = round_bf16(x)
    else:
        y = x.to(ptr.dtype.element_ty).to(tl.float32)
    return y


@triton.jit
def e4m3_groups(x, index, k0, k1, MOST: tl.constexpr, STOCHASTIC: tl.constexpr):
    """`quantize_groups` of e4m3: fp32 (groups, 128); MOST: `GROUPS["e4m3"].most(dtype)`."""
    codes, scale = quantize_groups(x, index, k0, k1, True, 448.0, 6.018531076210112e-36, MOST, STOCHASTIC)  # 2**-117
    return codes, scale


def _interpreter_rounds_twice() -> bool:
    """Whether `tl.fma` is a product and a sum: in the interpreter before triton 3.9."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return False
    from triton._C.libtriton import interpreter

    return not hasattr(interpreter, "fma_fp32")


_BY_HAND: tl.constexpr = tl.constexpr(_interpreter_rounds_twice())


@triton.jit
def fma(x, y, z):
    """x * y + z in fp32, rounded once: what torch's lerp, addcmul and add(alpha=) are on a CPU with AVX2.

    x is a block; y and z may be numbers.
    """
    if _BY_HAND:
        # The product is exact in fp64 and the sum's error is found exactly. A sum that is not exact gets an odd last
        # bit, so that rounding it to fp32 goes as the true sum would.
        zero = tl.zeros_like(x)
        product = x.to(tl.float64) * (zero + y).to(tl.float64)
        wide = (zero + z).to(tl.float64)
        total = product + wide
        back = total - product
        lost = (product - (total - back)) + (wide - back)
        bits = total.to(tl.int64, bitcast=True)
        step = tl.where((lost > 0) == (total > 0), 1, -1)
        bits += tl.where((lost != 0) & ((bits & 1) == 0), step, 0)
        result = bits.to(tl.float64, bitcast=True).to(tl.float32)
    else:
        result = tl.fma(x, y, z)
    return result
