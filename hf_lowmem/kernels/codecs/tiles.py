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
    from_bits,
    load_fp32,
    magnitude,
    reciprocal,
    rotate_half,
    round_bf16_up,
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
LARGEST_BITS: tl.constexpr = tl.constexpr(tables.LARGEST_BITS)
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
def state_word(word, SIGNED: tl.constexpr):
    """The bits that a state's encoder takes, int32. Reference: `Dither.of_state`."""
    return (word if SIGNED else rotate_half(word)).to(tl.int32, bitcast=True)


@triton.jit
def round_up(q, code, places, word, SIGNED: tl.constexpr):
    """The code whose value is below q, or the next one, at random. Reference: dither.py. `places`: of each code's."""
    pair = tl.load(places)  # int64: two fp32
    middle = from_bits((pair & 0xFFFFFFFF).to(tl.uint32))
    rate = from_bits((pair >> 32).to(tl.uint32))
    level = word.to(tl.float32)
    if not SIGNED:
        level = level * (q + middle)
    return code + ((q - middle) * rate > level).to(tl.int32)


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
        word = state_word(word, SIGNED)
        if CODEC == INT8:
            codes, scale = _int8_codes(x, codes_table, places_table, word, GROUP, SIGNED, DITHER)
            tl.store(scale_ptr + block, scale, mask=heads)
        else:
            size = tl.abs(x) if SIGNED else x
            top = largest(size, GROUP)
            if CODEC == SOFTSIGN and SIGNED:
                scale = round_bf16_up(tl.minimum(tl.maximum(top, SMALLEST_SCALE), BF16_MAX))
                codes = _softsign_codes(x, inverse(tl.maximum(scale, top) if DITHER else scale), word, DITHER)
                half = (bits_of(scale) >> 16).to(tl.uint16)
                tl.store((scale_ptr + block).to(tl.pointer_type(tl.uint16), bitcast=True), half, mask=heads)
            elif CODEC == SOFTSIGN:
                scale = tl.minimum(tl.maximum(top, SMALLEST_SCALE), FLOAT_MAX)
                q = x * inverse(scale)[:, None]
                bits = bits_of(q).to(tl.int32, bitcast=True)
                codes = _find(codes_table, (bits >> 16) & 0x7FFF, bits & 0xFFFF, 16)
                if DITHER:
                    codes = round_up(q, codes, places_table + codes, word, SIGNED)
                tl.store(scale_ptr + block, scale, mask=heads)
            else:
                scale = tl.minimum(tl.maximum(top, SMALLEST_A), FLOAT_MAX)
                least = tl.minimum(smallest(bits_of(size) - 1, GROUP), NO_VALUE) + 1  # 0 less 1 is the largest
                power = _power(scale, from_bits(least), powers_table, SIGNED)
                q = size * inverse(scale)[:, None]
                codes = _expand_codes(q, power, codes_table, rows_table)
                if DITHER:
                    codes = round_up(q, codes, (places_table + power * 128)[:, None] + codes, word, SIGNED)
                tl.store(scale_ptr + block, scale, mask=heads)
                tl.store(power_ptr + block, power.to(tl.uint8), mask=heads)
            bits = bits_of(size).to(tl.int32, bitcast=True)
            if CODEC == EXPAND and DITHER and not SIGNED:
                codes = tl.minimum(codes, bits)
            elif (CODEC == EXPAND and not DITHER) or not SIGNED:
                codes = tl.maximum(codes, tl.minimum(bits, 1))
            if CODEC == EXPAND and SIGNED:
                codes |= (bits_of(x) >> 24).to(tl.int32) & 0x80
        tl.store(codes_ptr + start + local, codes.to(tl.uint8), mask=mask)


@triton.jit
def _int8_codes(x, table, places, word, GROUP: tl.constexpr, SIGNED: tl.constexpr, DITHER: tl.constexpr):
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
        codes = round_up(q, codes, places + codes, word, SIGNED)
    if not SIGNED:
        codes = tl.maximum(codes, tl.minimum(magnitude(x), 1))
    return codes, scale


@triton.jit
def _softsign_codes(x, inverse, word, DITHER: tl.constexpr):
    """Codes of a signed state. Reference: `softsign_encode`."""
    b = tl.abs(x) * (inverse * SLOPE)[:, None] + OFFSET
    y = FARTHEST - reciprocal(b)
    near = (y + 12582912.0) - 12582912.0  # 1.5 * 2**23
    if DITHER:
        t = tl.abs(near - y)
        y = y - b * ((1.0 - t) * t)
        y = from_bits(bits_of(y) | (bits_of(x) & 0x80000000))
        codes = (bits_of(y + 384.0) + (word.to(tl.uint32, bitcast=True) >> 17) + 0x400000) >> 15
    else:
        codes = tl.minimum(near, 127.0).to(tl.int32)
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
def _expand_codes(q, power, table, rows):
    rows += power * 3
    shift, first, offset = tl.load(rows)[:, None], tl.load(rows + 1)[:, None], tl.load(rows + 2)
    bits = bits_of(q).to(tl.int32, bitcast=True)
    bits = tl.minimum(tl.maximum(bits, first), LARGEST_BITS)
    return _find((table + offset)[:, None], bits >> shift, bits, shift)
