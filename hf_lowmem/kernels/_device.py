"""Device functions that the Triton kernels share: bf16, random bits, exact division and what is cheaper than it.

Two rules make a kernel give the bits of its reference on every device, and in Triton's interpreter:

- **Casts to fp8 and bf16 are integer operations on the bits**, but where a device's own conversion is known to give
  the same. Triton refuses fp8 casts below sm_89, and its interpreter loses carries and subnormals in fp8 and rounds
  bf16 halves upwards. Integers are the same everywhere.
- **Floats are combined by single, correctly rounded operations only**: + - * as they stand (launch with
  `enable_fp_fusion=False`, or two of them become one FMA), `fma`, `div` and `sqrt` from here, as `/` and `tl.sqrt` are
  approximations on a GPU. Maxima are taken over `magnitude(x)`, whose integers have the order of the floats, with
  inf and nan above them, wherever a nan must be seen: `tl.max` of floats drops it or keeps it, by the device.

**What only a CUDA device can prove.** `reciprocal` and `root_of` are there the special function unit's approximation
and Newton's step, in the sequence that ptxas itself makes of the rounded operations; and fp8 is converted by an
instruction (_groups.py). In the interpreter the same functions are the rounded operations. That both give the same bits
is shown by tests/kernels/test_bits.py, mantissa by mantissa, when it is run on such a device.

Beside the `triton.py` of a kernel, this module, _groups.py and codecs/tiles.py are what imports triton.
"""

# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false, reportReturnType=false
# It reads the Python, not the language that @triton.jit makes of it.

import os

import triton
import triton.language as tl

from hf_lowmem.kernels import exact

GROUP: tl.constexpr = tl.constexpr(exact.GROUP)
FACTOR: tl.constexpr = tl.constexpr(exact.FACTOR)
FACTOR_STEP: tl.constexpr = tl.constexpr(exact.FACTOR_STEP)
INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@tl.core.builtin
def cuda_arch(_semantic=None):
    """90 for sm_90 and so on, 0 for what is no NVIDIA GPU: of the target compiled for, which need not be there."""
    assert _semantic is not None  # Triton hands it to a builtin
    arch = str(getattr(_semantic.builder.options, "arch", ""))
    return tl.constexpr(int(arch[2:].rstrip("af")) if arch.startswith("sm") else 0)


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


# What ptxas makes of rcp.rn and sqrt.rn where its check of the range passes, without the check: the special function
# unit's approximation, and Newton's step in FMAs. A branch a value, and the moves around it, cost more than these.
_RECIPROCAL: tl.constexpr = tl.constexpr(
    "{.reg .f32 n, r, e; neg.f32 n, $1; rcp.approx.ftz.f32 r, $1;"
    " fma.rn.f32 e, n, r, 0f3F800000; fma.rn.f32 $0, r, e, r;}"
)
_ROOT: tl.constexpr = tl.constexpr(
    "{.reg .f32 r, s, n, h, e; rsqrt.approx.ftz.f32 r, $1; mul.rn.f32 s, $1, r;"
    " mul.rn.f32 h, r, 0f3F000000; neg.f32 n, s; fma.rn.f32 e, n, s, $1; fma.rn.f32 $0, e, h, s;}"
)


@triton.jit
def reciprocal(y) -> tl.tensor:
    """1 / y in fp32, correctly rounded for 2**-126 <= |y| < 2**125. Reference: `y.reciprocal()`.

    Four instructions on NVIDIA's GPUs. That they round correctly rests on the approximation's own error, which is
    not specified to the last bit: only a device can prove it, mantissa by mantissa.
    """
    if INTERPRETED or cuda_arch() == 0:
        r = div(1.0, y)
    else:
        r = tl.inline_asm_elementwise(_RECIPROCAL, "=f,f", [y], dtype=tl.float32, is_pure=True, pack=1)
    return r


@triton.jit
def root_of(x) -> tl.tensor:
    """sqrt(x) in fp32, correctly rounded for 2**-101 <= x < 2**126; on NVIDIA's GPUs like `reciprocal`."""
    if INTERPRETED or cuda_arch() == 0:
        s = sqrt(x)
    else:
        s = tl.inline_asm_elementwise(_ROOT, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return s


_FOUR: tl.constexpr = tl.constexpr("ld.global.nc.v4.f32 {$0, $1, $2, $3}, [$4];")
_SHARE: tl.constexpr = tl.constexpr("mul.rn.sat.f32 $0, $1, $2;")


@triton.jit
def load_four(table, index):
    """Row `index` of a constant table of four fp32 a row, which begins at a multiple of 16: one load on a GPU."""
    if INTERPRETED or cuda_arch() == 0:
        ptr = table + index * 4
        four = tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2), tl.load(ptr + 3)
    else:
        four = tl.inline_asm_elementwise(
            _FOUR,
            "=f,=f,=f,=f,l",
            [table.to(tl.int64) + index.to(tl.int64) * 16],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    return four


@triton.jit
def share(x, y):
    """x * y, of what is not negative, but 1 where that is more, and 0 for a nan."""
    if INTERPRETED or cuda_arch() == 0:
        z = x * y
        z = tl.where(z >= 0, tl.minimum(z, 1.0), 0.0)
    else:
        z = tl.inline_asm_elementwise(_SHARE, "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1)
    return z


_BYTES: tl.constexpr = tl.constexpr(
    "{.reg .b32 a, b; prmt.b32 a, $1, $2, 0x62; prmt.b32 b, $3, $4, 0x62; prmt.b32 $0, a, b, 0x5410;}"
)


@triton.jit
def third_byte(x):
    """Bits 16 to 23 of each uint32, uint8: three instructions for four on an NVIDIA GPU."""
    if INTERPRETED or cuda_arch() == 0:
        y = ((x >> 16) & 0xFF).to(tl.uint8)
    else:
        y = tl.inline_asm_elementwise(_BYTES, "=r,r,r,r,r", [x], dtype=tl.uint8, is_pure=True, pack=4)
    return y


@triton.jit
def negative(x):
    """-x, which costs an `fma` nothing. (Triton 3.6 writes 0 - x, an operation of its own.)"""
    if INTERPRETED or cuda_arch() == 0:
        y = -x
    else:
        y = tl.inline_asm_elementwise("neg.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def floor(x):
    """The integer below, as fp32. (Triton's own flushes denormals first, which no check of its code could tell from
    what must not.)"""
    if INTERPRETED or cuda_arch() == 0:
        y = tl.floor(x)
    else:
        y = tl.inline_asm_elementwise("cvt.rmi.f32.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


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
    """Values of any float dtype as fp32; zero where not `mask`, which is None where all are there."""
    return widen(tl.load(ptr) if mask is None else tl.load(ptr, mask=mask, other=0.0))


@triton.jit
def store_rounded(ptr, x, mask):
    """fp32 written as the pointer's float dtype, to the nearest, ties to even.

    To bf16 by the device's own conversion, one instruction for two values where `round_bf16` takes six for one; the
    interpreter's is wrong.
    """
    tl.store(ptr, round_to(ptr, x), mask=mask)


@triton.jit
def round_to(ptr, x):
    """fp32 in the pointer's float dtype, as `store_rounded` writes it."""
    if INTERPRETED and ptr.dtype.element_ty == tl.bfloat16:
        y = as_bf16(round_bf16(x))
    else:
        y = x.to(ptr.dtype.element_ty)
    return y


@triton.jit
def round_nearest(y):
    """fp32, |y| <= 2**22 -> the nearest integer, ties to even, int32."""
    return (y + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000  # 1.5 * 2**23 and its bits


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
def rotate_half(word):
    """uint32 with its halves exchanged."""
    return (word << 16) | (word >> 16)


@triton.jit
def grouped_word(index, groups, k0, k1):
    """32 random bits of each index (int64) + GROUP * groups. Reference: `grouped_bits` of exact.py."""
    pair = ((index >> 1) & (GROUP // 2 - 1)).to(tl.uint32)
    word = random_word((index // GROUP).to(tl.uint32) + groups, k0, k1) * (pair * FACTOR_STEP + FACTOR)
    return tl.where((index & 1) != 0, rotate_half(word), word)


@triton.jit
def grouped_words(start, k0, k1, flip, ROWS: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr):
    """`grouped_word` of (ROWS, WIDTH) values that lie one after another from `start` on, xor `flip`, 0 or all ones.

    ALIGNED: start is a multiple of GROUP, so that those of a row share a hash. WIDTH: a divisor of GROUP.
    """
    if ALIGNED:
        row = tl.arange(0, ROWS) * WIDTH
        group = (start // GROUP).to(tl.uint32) + (row // GROUP).to(tl.uint32)
        # The complement of a product is the product of the negative, less one.
        hashed = (random_word(group, k0, k1) ^ flip) - flip
        first = hashed * ((row % GROUP // 2).to(tl.uint32) * FACTOR_STEP + FACTOR) + flip
        word = hashed[:, None] * (tl.arange(0, WIDTH // 2).to(tl.uint32) * FACTOR_STEP)[None, :] + first[:, None]
        words = tl.reshape(tl.join(word, rotate_half(word)), (ROWS, WIDTH))
    else:
        place = tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        words = grouped_word(start + place, 0, k0, k1) ^ flip
    return words


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
def exp_short(x):
    """e**x for what is rounded to 16 bits, |x| cut at 86; a nan is not kept. Reference: glu's `exp_short`."""
    t = tl.minimum(tl.maximum(x, -86.0), 86.0) * 1.4426950408889634
    n = t + 12582912.0  # the nearest integer in the lowest bits
    f = t - (n - 12582912.0)
    p = f * 0.0013276472454890609 + 0.009675540961325169
    p = p * f + 0.05550713092088699
    p = p * f + 0.24022120237350464
    p = p * f + 0.6931469440460205
    p = p * f + 1.0000001192092896
    return from_bits(bits_of(p) + (bits_of(n) << 23))


@triton.jit
def round_as(ptr, x):
    """fp32 rounded to the pointer's float dtype, to the nearest, ties to even, still as fp32; as `store_rounded`."""
    if INTERPRETED and ptr.dtype.element_ty == tl.bfloat16:
        y = round_bf16(x)
    else:
        y = widen(x.to(ptr.dtype.element_ty))
    return y


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
