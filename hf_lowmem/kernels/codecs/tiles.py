"""The 8-bit codecs on a device: what one program encodes or decodes is a tile of whole blocks.

A tile is (ROWS, WIDTH), a row of it one thread's; a block of 64, 128 or 256 values is a few rows, all in one warp.
What belongs to a block (its scale, its power) is kept beside each of its rows, so that nothing is moved between threads
but by the shuffles of a maximum, and no layout is converted.

The fused optimizers call `encode_tile` and `decode_tile` on values that never leave the registers.
"""

import triton
import triton.language as tl

from hf_lowmem.kernels._device import (
    bits_of,
    floor,
    fma,
    from_bits,
    load_four,
    load_fp32,
    magnitude,
    negative,
    reciprocal,
    round_bf16_up,
    share,
    third_byte,
)
from hf_lowmem.kernels.codecs import reference, tables
from hf_lowmem.kernels.exact import FLOAT_MAX as LARGEST_FLOAT

ROWS: tl.constexpr = tl.constexpr(128)
WIDTH: tl.constexpr = tl.constexpr(16)
TILE = 2048  # ROWS * WIDTH: a row for each thread of four warps
NUM_WARPS = 4

FP32: tl.constexpr = tl.constexpr(0)  # a state that no codec stores
INT8: tl.constexpr = tl.constexpr(1)
SOFTSIGN: tl.constexpr = tl.constexpr(2)
EXPAND: tl.constexpr = tl.constexpr(3)
NUMBERS = {"fp32": 0, "int8": 1, "int8_softsign": 2, "fp8_expand": 3}

SMALLEST_SCALE: tl.constexpr = tl.constexpr(reference.SMALLEST_SCALE)
SMALLEST_A: tl.constexpr = tl.constexpr(reference.SMALLEST_A)
SMALLEST_B: tl.constexpr = tl.constexpr(reference.SMALLEST_B)
SLOPE: tl.constexpr = tl.constexpr(reference.SLOPE)
OFFSET: tl.constexpr = tl.constexpr(reference.OFFSET)
FARTHEST: tl.constexpr = tl.constexpr(reference.FARTHEST)
BF16_MAX: tl.constexpr = tl.constexpr(reference.BF16_MAX)
FLOAT_MAX: tl.constexpr = tl.constexpr(LARGEST_FLOAT)
POWER_OF_ONE: tl.constexpr = tl.constexpr(tables.POWER_OF_ONE)
LOWEST: tl.constexpr = tl.constexpr(tables.LOWEST)
ORIGIN: tl.constexpr = tl.constexpr(float(tables.ORIGIN))
NO_VALUE: tl.constexpr = tl.constexpr(0x7F7FFFFE)


@triton.jit
def largest(x, GROUP: tl.constexpr):
    """The largest of each block, beside each of its rows: (ROWS,) of x (ROWS, WIDTH)."""
    return _beside(tl.max(tl.reshape(tl.max(x, axis=1), (ROWS // GROUP, GROUP)), axis=1), GROUP)


@triton.jit
def smallest(x, GROUP: tl.constexpr):
    """The smallest of each block, beside each of its rows: (ROWS,) of x (ROWS, WIDTH)."""
    return _beside(tl.min(tl.reshape(tl.min(x, axis=1), (ROWS // GROUP, GROUP)), axis=1), GROUP)


@triton.jit
def _beside(of_blocks, GROUP: tl.constexpr):
    return tl.reshape(tl.broadcast_to(of_blocks[:, None], (ROWS // GROUP, GROUP)), (ROWS,))


@triton.jit
def tile_offsets():
    """Place of each value in a tile, int32 (ROWS, WIDTH)."""
    return tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def store_tile(ptr, x, mask):
    """Store a tile that begins at `ptr`. A row of 16-bit values in two halves of 16 bytes, the widest store there is:
    to move them between threads, so that neighbours write side by side, takes more instructions than all of this."""
    if mask is None and x.dtype.primitive_bitwidth == 16:
        half = tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH // 2)[None, :]
        first, second = tl.split(tl.trans(tl.reshape(x, (ROWS, 2, WIDTH // 2)), (0, 2, 1)))
        tl.store(ptr + half, first)
        tl.store(ptr + half + WIDTH // 2, second)
    else:
        tl.store(ptr + tile_offsets(), x, mask=mask)


@triton.jit
def inverse(scale):
    """1 / scale; a denormal beyond 2**126. Reference: `inverse` of reference.py."""
    return reciprocal(scale * 0.00390625) * 0.00390625  # 2**-8


@triton.jit
def decode_tile(
    codes_ptr,
    scale_ptr,
    power_ptr,
    values_ptr,
    start,
    left,
    CODEC: tl.constexpr,
    SIGNED: tl.constexpr,
    EVEN: tl.constexpr,
):
    """The values of the tile that begins at value `start` (int64), fp32 (ROWS, WIDTH); zeros from `left` on.

    EVEN: it is a whole tile, and nothing is masked.
    """
    local = tile_offsets()
    mask = None if EVEN else local < left
    if CODEC == FP32:
        x = load_fp32(codes_ptr + start + local, mask)
    else:
        GROUP: tl.constexpr = (256 if CODEC == INT8 else (64 if CODEC == SOFTSIGN else 128)) // WIDTH
        row = tl.arange(0, ROWS)
        inside = None if EVEN else row * WIDTH < left
        block = start // (GROUP * WIDTH) + row // GROUP
        scale = load_fp32(scale_ptr + block, inside)
        codes = _load(codes_ptr + start + local, mask).to(tl.int32)
        if CODEC == EXPAND:
            power = _load(power_ptr + block, inside).to(tl.int32)
            found = tl.load((values_ptr + power * 256)[:, None] + codes)
        else:
            found = tl.load(values_ptr + codes)
        x = found * scale[:, None]
        if not EVEN:
            # Code 0 of a signed map is its lowest value, which would be the extreme of a ragged block.
            x = tl.where(mask, x, 0.0)
    return x


@triton.jit
def _load(ptr, mask):
    """Integers; zero where not `mask`, which is None where all are there."""
    return tl.load(ptr) if mask is None else tl.load(ptr, mask=mask, other=0)


@triton.jit
def _find(table_ptr, place, bits, shift):
    """The code from a packed table: see tables.py."""
    return (tl.load(table_ptr + place) + bits) >> shift


@triton.jit
def state_noise(word, SIGNED: tl.constexpr):
    """The 16 bits of each word that a state's encoder takes. Reference: `Dither.of_state`, the upper half."""
    return word >> 16 if SIGNED else word & 0xFFFF


@triton.jit
def code_at(place, noise):
    """The code below a place, or the next one, at random: in bits 16 to 23. Reference: `code_at` of dither.py."""
    return (bits_of(place) << 2) + noise


@triton.jit
def round_up(q, places, index, noise):
    """`code_at` of the place of q, by the polynomial `places[index]`. Reference: `round_up` of dither.py."""
    start, slope, square, middle = load_four(places, index)
    d = q - middle
    return code_at(fma(d, fma(d, square, slope), start), noise)


@triton.jit
def encode_tile(
    x,
    word,
    codes_ptr,
    scale_ptr,
    power_ptr,
    codes_table,
    places_table,
    powers_table,
    rows_table,
    start,
    left,
    CODEC: tl.constexpr,
    SIGNED: tl.constexpr,
    DITHER: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Write the codes and scalars of x, fp32 (ROWS, WIDTH) that is zero from `left` on, where the tile belongs.

    With DITHER codes are rounded at random, by `word`, uint32 of the same shape; else to the nearest.
    """
    local = tile_offsets()
    mask = None if EVEN else local < left
    if CODEC == FP32:
        tl.store(codes_ptr + start + local, x, mask=mask)
    else:
        GROUP: tl.constexpr = (256 if CODEC == INT8 else (64 if CODEC == SOFTSIGN else 128)) // WIDTH
        row = tl.arange(0, ROWS)
        # One row writes for its block.
        heads = row % GROUP == 0 if EVEN else (row % GROUP == 0) & (row * WIDTH < left)
        block = start // (GROUP * WIDTH) + row // GROUP
        noise = state_noise(word, SIGNED)
        if CODEC == INT8:
            codes, scale = _int8_codes(x, codes_table, places_table, noise, GROUP, SIGNED, DITHER)
            tl.store(scale_ptr + block, scale, mask=heads)
        else:
            size = tl.abs(x) if SIGNED else x
            top = largest(size, GROUP)
            if CODEC == SOFTSIGN and SIGNED:
                scale = round_bf16_up(tl.minimum(tl.maximum(top, SMALLEST_SCALE), BF16_MAX))
                codes = _softsign_codes(x, inverse(tl.maximum(scale, top) if DITHER else scale), noise, DITHER)
                half = (bits_of(scale) >> 16).to(tl.uint16)
                tl.store((scale_ptr + block).to(tl.pointer_type(tl.uint16), bitcast=True), half, mask=heads)
            elif CODEC == SOFTSIGN:
                scale = tl.minimum(tl.maximum(top, SMALLEST_SCALE), FLOAT_MAX)
                q = x * inverse(scale)[:, None]
                bits = bits_of(q).to(tl.int32, bitcast=True)
                codes = _find(codes_table, (bits >> 16) & 0x7FFF, bits & 0xFFFF, 16)
                if DITHER:
                    codes = third_byte(round_up(q, places_table, codes, noise)).to(tl.int32)
                tl.store(scale_ptr + block, scale, mask=heads)
            else:
                scale = tl.minimum(tl.maximum(top, SMALLEST_A), FLOAT_MAX)
                least = tl.minimum(smallest(bits_of(size) - 1, GROUP), NO_VALUE) + 1  # 0 less 1 is the largest
                power = _power(scale, from_bits(least), powers_table, SIGNED)
                q = share(size, inverse(scale)[:, None])
                codes = _expand_codes(q, x, power, codes_table, places_table, rows_table, noise, SIGNED, DITHER)
                tl.store(scale_ptr + block, scale, mask=heads)
                tl.store(power_ptr + block, power.to(tl.uint8), mask=heads)
            bits = bits_of(size).to(tl.int32, bitcast=True)
            if CODEC == EXPAND and DITHER:
                codes = third_byte(codes)
            elif CODEC == EXPAND or not SIGNED:
                codes = tl.maximum(codes, tl.minimum(bits, 1))
                if SIGNED:
                    codes |= (bits_of(x) >> 24).to(tl.int32) & 0x80
        tl.store(codes_ptr + start + local, codes.to(tl.uint8), mask=mask)


@triton.jit
def _int8_codes(x, table, places, noise, GROUP: tl.constexpr, SIGNED: tl.constexpr, DITHER: tl.constexpr):
    high = largest(x, GROUP)
    scale = tl.maximum(high, SMALLEST_SCALE)
    if SIGNED:
        low = largest(-x, GROUP)
        scale = tl.where(high >= low, scale, -tl.maximum(low, SMALLEST_SCALE))
    q = x * inverse(scale)[:, None]
    bits = bits_of(q)
    codes = _find(table, bits >> 16, (bits & 0xFFFF).to(tl.int32), 16)
    if SIGNED:
        codes = (codes ^ (bits.to(tl.int32, bitcast=True) >> 31)) & 0xFF
    if DITHER:
        codes = third_byte(round_up(tl.maximum(q, LOWEST), places, codes, noise)).to(tl.int32)
    if not SIGNED:
        codes = tl.maximum(codes, tl.minimum(magnitude(x), 1))
    return codes, scale


@triton.jit
def _softsign_codes(x, inverse, noise, DITHER: tl.constexpr):
    """Codes of a signed state. Reference: `softsign_encode`."""
    b = fma(tl.abs(x), (inverse * SLOPE)[:, None], OFFSET)
    y = FARTHEST - reciprocal(b)
    if DITHER:
        t = y - floor(y)
        y = fma(negative(b), fma(negative(t), t, t), y)
        y = from_bits(bits_of(y) | (bits_of(x) & 0x80000000))
        codes = third_byte(code_at(y + ORIGIN, noise))
    else:
        codes = tl.minimum((y + 12582912.0) - 12582912.0, 127.0).to(tl.int32)  # 1.5 * 2**23
        codes = tl.where(x < 0, -codes, codes)
    return codes


@triton.jit
def _power(a, b, table, SIGNED: tl.constexpr):
    """The stored power of each block: 255 less the number of thresholds below a / b."""
    ratio = bits_of(inverse(tl.maximum(b, SMALLEST_B)) * a).to(tl.int32, bitcast=True)
    power = 255 - _find(table, (ratio >> 16) & 0x7FFF, ratio & 0xFFFF, 16)
    if SIGNED:
        power = tl.maximum(power, POWER_OF_ONE)
    return power


@triton.jit
def _expand_codes(q, x, power, table, cells, rows, noise, SIGNED: tl.constexpr, DITHER: tl.constexpr):
    """The last 7 bits of the codes; with DITHER whole, in bits 16 to 23. Reference: `expand_encode`."""
    rows += power * 3
    shift, first, offset = tl.load(rows)[:, None], tl.load(rows + 1)[:, None], tl.load(rows + 2)
    bits = tl.maximum(bits_of(q).to(tl.int32, bitcast=True), first)
    if DITHER:
        start, slope, bend, anchor = load_four((cells + offset * 4)[:, None], bits >> shift)
        d = q - anchor
        codes = bits_of(fma(tl.minimum(d, 0.0), bend, fma(d, slope, start)))
        if SIGNED:
            codes = ((codes + noise) & 0x7FFFFF) | ((bits_of(x) >> 8) & 0x800000)
        else:
            codes = codes * tl.minimum(bits_of(x).to(tl.int32, bitcast=True), 1).to(tl.uint32, bitcast=True) + noise
    else:
        codes = _find((table + offset)[:, None], bits >> shift, bits, shift)
    return codes
