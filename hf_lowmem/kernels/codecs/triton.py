"""The 8-bit codecs in Triton: what one program encodes or decodes is a tile of whole blocks.

A tile is (ROWS, 64): 64 divides the blocks of all codecs, and a block of 128 or 256 is two or four rows. An extreme is
taken along the rows first, where most of the work is, then across the few rows of a block.

How many rows of 64 a block has is written out where it is needed: up to triton 3.6 what a jit function returns is no
constant.

The fused optimizers call `encode_tile` and `decode_tile` on values that never leave the registers.
"""

# A jit function is called with launch options, and with plain numbers where it declares constants.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowmem.kernels._device import bits_of, div, from_bits, magnitude, random_word, round_bf16_up, round_nearest
from hf_lowmem.kernels.codecs import reference, tables
from hf_lowmem.kernels.codecs.dither import even
from hf_lowmem.kernels.exact import FLOAT_MAX as LARGEST_FLOAT
from hf_lowmem.kernels.exact import seed_keys

ROWS: tl.constexpr = tl.constexpr(16)
WIDTH: tl.constexpr = tl.constexpr(64)
TILE = 1024  # ROWS * WIDTH: eight values a thread of four warps
NUM_WARPS = 4

FP32: tl.constexpr = tl.constexpr(0)  # a state that no codec stores
INT8: tl.constexpr = tl.constexpr(1)
SOFTSIGN: tl.constexpr = tl.constexpr(2)
EXPAND: tl.constexpr = tl.constexpr(3)
NUMBERS = {"fp32": 0, "int8": 1, "int8_softsign": 2, "fp8_expand": 3}

SMALLEST_SCALE: tl.constexpr = tl.constexpr(reference.SMALLEST_SCALE)
SMALLEST_A: tl.constexpr = tl.constexpr(reference.SMALLEST_A)
SMALLEST_B: tl.constexpr = tl.constexpr(reference.SMALLEST_B)
SOFTNESS: tl.constexpr = tl.constexpr(tables.SOFTNESS)
STRETCH: tl.constexpr = tl.constexpr((1 + tables.SOFTNESS) * tables.STEPS[True])
BF16_MAX: tl.constexpr = tl.constexpr(reference.BF16_MAX)
FLOAT_MAX: tl.constexpr = tl.constexpr(LARGEST_FLOAT)
LARGEST_CODE: tl.constexpr = tl.constexpr(tables.LARGEST_CODE)
POWER_OF_ONE: tl.constexpr = tl.constexpr(tables.POWER_OF_ONE)
LARGEST_BITS: tl.constexpr = tl.constexpr(tables.LARGEST_BITS)
NO_VALUE: tl.constexpr = tl.constexpr(0x7F7FFFFE)


@triton.jit
def largest(x, GROUP: tl.constexpr):
    """The largest of each block, (ROWS // GROUP,), of x (ROWS, WIDTH)."""
    return tl.max(tl.reshape(tl.max(x, axis=1), (ROWS // GROUP, GROUP)), axis=1)


@triton.jit
def smallest(x, GROUP: tl.constexpr):
    """The smallest of each block, (ROWS // GROUP,), of x (ROWS, WIDTH)."""
    return tl.min(tl.reshape(tl.min(x, axis=1), (ROWS // GROUP, GROUP)), axis=1)


@triton.jit
def spread(of_blocks, GROUP: tl.constexpr):
    """A value of each block (ROWS // GROUP,) beside each of its rows, (ROWS, 1)."""
    return tl.reshape(tl.broadcast_to(of_blocks[:, None], (ROWS // GROUP, GROUP)), (ROWS, 1))


@triton.jit
def tile_offsets():
    """Place of each value in a tile, int32 (ROWS, WIDTH)."""
    return tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def decode_tile(codes_ptr, scale_ptr, power_ptr, values_ptr, start, left, CODEC: tl.constexpr, SIGNED: tl.constexpr):
    """The values of the tile that begins at value `start` (int64), fp32 (ROWS, WIDTH); zeros from `left` on."""
    local = tile_offsets()
    mask = local < left
    if CODEC == FP32:
        x = tl.load(codes_ptr + start + local, mask=mask, other=0.0)
    else:
        GROUP: tl.constexpr = 4 if CODEC == INT8 else (1 if CODEC == SOFTSIGN else 2)
        block = tl.arange(0, ROWS // GROUP)
        inside = block * (GROUP * WIDTH) < left
        first = start // (GROUP * WIDTH)
        scale = from_bits(_scale_bits(scale_ptr + first + block, inside))
        where = tl.load(codes_ptr + start + local, mask=mask, other=0).to(tl.int32)
        if CODEC == EXPAND:
            power = tl.load(power_ptr + first + block, mask=inside, other=0).to(tl.int32)
            where += spread(power, GROUP) * 256
        # Code 0 of a signed map is its lowest value, which would be the extreme of a ragged block.
        x = tl.where(mask, tl.load(values_ptr + where) * spread(scale, GROUP), 0.0)
    return x


@triton.jit
def _scale_bits(ptr, mask):
    """An fp32 or bf16 scale as the bits of an fp32."""
    if ptr.dtype.element_ty == tl.bfloat16:
        bits = tl.load(ptr.to(tl.pointer_type(tl.uint16), bitcast=True), mask=mask, other=0).to(tl.uint32) << 16
    else:
        bits = tl.load(ptr.to(tl.pointer_type(tl.uint32), bitcast=True), mask=mask, other=0)
    return bits


@triton.jit
def _find(table_ptr, place, bits, shift):
    """The code from a packed table: see tables.py."""
    return (tl.load(table_ptr + place) + bits) >> shift


@triton.jit
def state_word(index, k0, k1, flip):
    """32 random bits of each index; k0, k1, flip: from `state_keys`. Reference: `Dither.words`."""
    return random_word(index, k0, k1) ^ flip.to(tl.uint32)


@triton.jit
def threshold(word, SIGNED: tl.constexpr):
    """A number in (0, 1) from a random word. Reference: `Dither.thresholds`."""
    if not SIGNED:
        word = (word << 16) | (word >> 16)
    return ((word >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2**-23


@triton.jit
def round_between(q, nearest, values, row, TOP: tl.constexpr, u, SIGNED: tl.constexpr):
    """The code below q or the one above, at random; `values + row`: of the codes. Reference: dither.py."""
    near = tl.load(values + (row + nearest))
    above = near > q
    other = tl.load(values + (row + tl.minimum(tl.maximum(tl.where(above, nearest - 1, nearest + 1), 0), TOP)))
    low, high = tl.where(above, other, near), tl.where(above, near, other)
    rest, gap = q - low, (high - low) * u
    up = rest > gap if SIGNED else rest * (low + high) > gap * (low + q)
    return tl.minimum(tl.maximum(tl.where(above, nearest - 1, nearest) + up.to(tl.int32), 0), TOP)


@triton.jit
def encode_tile(
    x,
    word,
    codes_ptr,
    scale_ptr,
    power_ptr,
    values_ptr,
    codes_table,
    powers_table,
    rows_table,
    start,
    left,
    CODEC: tl.constexpr,
    SIGNED: tl.constexpr,
    DITHER: tl.constexpr,
):
    """Write the codes and scalars of x, fp32 (ROWS, WIDTH) that is zero from `left` on, where the tile belongs.

    With DITHER codes are rounded at random, by `word`, uint32 of the same shape; else to the nearest.
    """
    local = tile_offsets()
    mask = local < left
    if CODEC == FP32:
        tl.store(codes_ptr + start + local, x, mask=mask)
    else:
        GROUP: tl.constexpr = 4 if CODEC == INT8 else (1 if CODEC == SOFTSIGN else 2)
        block = tl.arange(0, ROWS // GROUP)
        inside = block * (GROUP * WIDTH) < left
        first = start // (GROUP * WIDTH)
        u = threshold(word, SIGNED)
        size = magnitude(x)
        if CODEC == INT8:
            q, codes, scale = _int8_codes(x, codes_table, GROUP, SIGNED)
            if DITHER:
                codes = round_between(q, codes, values_ptr, 0, 255, u, SIGNED)
        else:
            top = from_bits(largest(size, GROUP).to(tl.uint32))
            if CODEC == SOFTSIGN:
                if SIGNED:
                    scale = round_bf16_up(tl.minimum(tl.maximum(top, SMALLEST_SCALE), BF16_MAX))
                else:
                    scale = tl.minimum(tl.maximum(top, SMALLEST_SCALE), FLOAT_MAX)
                q = div(from_bits(size.to(tl.uint32)), spread(scale, GROUP))
                codes = _softsign_codes(q, codes_table, SIGNED)
                if DITHER:
                    codes = round_between(q, codes, values_ptr, 0, 127 if SIGNED else 255, u, SIGNED)
                if SIGNED:
                    codes = tl.where(bits_of(x) >> 31 != 0, -codes, codes)
            else:
                scale = tl.minimum(tl.maximum(top, SMALLEST_A), FLOAT_MAX)
                least = tl.minimum(smallest((size - 1) & 0x7FFFFFFF, GROUP), NO_VALUE) + 1
                power = _power(scale, from_bits(least.to(tl.uint32)), powers_table, SIGNED)
                q = div(from_bits(size.to(tl.uint32)), spread(scale, GROUP))
                codes = _expand_codes(q, power, codes_table, rows_table, GROUP)
                if DITHER:
                    codes = round_between(q, codes, values_ptr, spread(power, GROUP) * 256, LARGEST_CODE, u, SIGNED)
                tl.store(power_ptr + first + block, power.to(tl.uint8), mask=inside)
        if scale_ptr.dtype.element_ty == tl.bfloat16:
            half = (bits_of(scale) >> 16).to(tl.uint16)
            tl.store((scale_ptr + first + block).to(tl.pointer_type(tl.uint16), bitcast=True), half, mask=inside)
        else:
            tl.store(scale_ptr + first + block, scale, mask=inside)
        if (CODEC == EXPAND and not DITHER) or not SIGNED:
            codes = tl.maximum(codes, (size != 0).to(tl.int32))
        if CODEC == EXPAND and SIGNED:
            codes |= (bits_of(x) >> 24).to(tl.int32) & 0x80
        tl.store(codes_ptr + start + local, codes.to(tl.uint8), mask=mask)


@triton.jit
def _int8_codes(x, table, GROUP: tl.constexpr, SIGNED: tl.constexpr):
    high = largest(x, GROUP)
    scale = tl.maximum(high, SMALLEST_SCALE)
    if SIGNED:
        low = largest(-x, GROUP)
        scale = tl.where(high >= low, scale, -tl.maximum(low, SMALLEST_SCALE))
    q = div(x, spread(scale, GROUP))
    bits = bits_of(q)
    codes = _find(table, bits >> 16, (bits & 0xFFFF).to(tl.int32), 16)
    if SIGNED:
        codes ^= bits.to(tl.int32, bitcast=True) >> 31
    return q, codes & 0xFF, scale


@triton.jit
def _softsign_codes(q, table, SIGNED: tl.constexpr):
    if SIGNED:
        codes = tl.minimum(tl.maximum(round_nearest(div(q * STRETCH, q + SOFTNESS)), 0), 127)
    else:
        bits = bits_of(q)
        codes = _find(table, (bits >> 16) & 0x7FFF, (bits & 0xFFFF).to(tl.int32), 16)
    return codes


@triton.jit
def _power(a, b, table, SIGNED: tl.constexpr):
    """The stored power of each block: 255 less the number of thresholds below a / b."""
    ratio = div(a, tl.maximum(b, SMALLEST_B))
    below = tl.zeros_like(ratio).to(tl.int32)
    for i in tl.static_range(8):  # 255 of them are halved eight times
        below += tl.where(tl.load(table + below + ((128 >> i) - 1)) < ratio, 128 >> i, 0)
    power = 255 - below
    if SIGNED:
        power = tl.maximum(power, POWER_OF_ONE)
    return power


@triton.jit
def _expand_codes(q, power, table, rows, GROUP: tl.constexpr):
    shift = spread(tl.load(rows + power * 3), GROUP)
    first = spread(tl.load(rows + power * 3 + 1), GROUP)
    offset = spread(tl.load(rows + power * 3 + 2), GROUP)
    bits = bits_of(q).to(tl.int32, bitcast=True)
    bits = tl.minimum(tl.maximum(bits, first), LARGEST_BITS)
    return _find(table, (bits >> shift) + offset, bits, shift)


@triton.jit(do_not_specialize=["k0", "k1", "flip", "offset"])
def _encode(
    x_ptr,
    codes_ptr,
    scale_ptr,
    power_ptr,
    values_ptr,
    codes_table,
    powers_table,
    rows_table,
    n,
    k0,
    k1,
    flip,
    offset,
    CODEC: tl.constexpr,
    SIGNED: tl.constexpr,
    DITHER: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * (ROWS * WIDTH)
    left = tl.minimum(n - start, ROWS * WIDTH).to(tl.int32)
    local = tile_offsets()
    x = tl.load(x_ptr + start + local, mask=local < left, other=0.0)
    word = state_word(offset.to(tl.uint32) + start.to(tl.uint32) + local.to(tl.uint32), k0, k1, flip)
    encode_tile(
        x,
        word,
        codes_ptr,
        scale_ptr,
        power_ptr,
        values_ptr,
        codes_table,
        powers_table,
        rows_table,
        start,
        left,
        CODEC,
        SIGNED,
        DITHER,
    )


@triton.jit
def _decode(codes_ptr, scale_ptr, power_ptr, values_ptr, out_ptr, n, CODEC: tl.constexpr, SIGNED: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * (ROWS * WIDTH)
    left = tl.minimum(n - start, ROWS * WIDTH).to(tl.int32)
    x = decode_tile(codes_ptr, scale_ptr, power_ptr, values_ptr, start, left, CODEC, SIGNED)
    local = tile_offsets()
    tl.store(out_ptr + start + local, x, mask=local < left)


def state_keys(seed: int) -> tuple[int, int, int]:
    """Kernel arguments for a state's seed: the two keys of its pair of steps, and -1 in the mirrored step, else 0."""
    return (*seed_keys(even(seed)), -(seed & 1))


def as_int32(index: int) -> int:
    """An index modulo 2**32, as the int32 of the same bits."""
    return ((index & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def tables_of(codec: str, signed: bool, device: torch.device) -> tuple[Tensor, ...]:
    """(values, codes, powers, rows) on `device`. What a codec has not got is another of its tables, never read."""
    if codec == "int8":
        values, codes = (t[signed].on(device) for t in (tables.MAPS, tables.NEAREST))
        return values, codes, values, codes
    if codec == "int8_softsign":
        values = tables.SOFTSIGN_VALUES[signed].on(device)
        codes = tables.SOFTSIGN_CODES.on(device)
        return values, codes, values, codes
    values, powers = tables.EXPANDED_VALUES.on(device), tables.POWERS[signed].on(device)
    return values, tables.EXPANDING_TABLE.on(device), powers, tables.EXPANDING_ROWS.on(device)


def encode_state(
    value: Tensor, codes: Tensor, scalars: list[Tensor], codec: str, signed: bool, seed: int | None, offset: int
) -> None:
    if value.numel() == 0:
        return
    values, codes_table, powers, rows = tables_of(codec, signed, value.device)
    _encode[(triton.cdiv(value.numel(), TILE),)](
        value.contiguous(),
        codes,
        scalars[0],
        scalars[-1],
        values,
        codes_table,
        powers,
        rows,
        value.numel(),
        *state_keys(seed or 0),
        as_int32(offset),
        NUMBERS[codec],
        signed,
        seed is not None,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )


def decode_state(codes: Tensor, scalars: list[Tensor], codec: str, signed: bool) -> Tensor:
    out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    if codes.numel() == 0:
        return out
    values = tables_of(codec, signed, codes.device)[0]
    _decode[(triton.cdiv(codes.numel(), TILE),)](
        codes,
        scalars[0],
        scalars[-1],
        values,
        out,
        codes.numel(),
        NUMBERS[codec],
        signed,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    return out


def compile_cases() -> list[tuple[str, object, dict[str, str], dict[str, object], int]]:
    """(label, function, signature, constexprs, warps) of every variant, for compilation ahead of time."""
    cases: list[tuple[str, object, dict[str, str], dict[str, object], int]] = []
    for codec, number in list(NUMBERS.items())[1:]:
        for signed in (True, False):
            scale = "*bf16" if codec == "int8_softsign" and signed else "*fp32"
            power = scale if codec != "fp8_expand" else "*u8"
            constants: dict[str, object] = {"CODEC": number, "SIGNED": signed}
            label = f"{codec} {'signed' if signed else 'unsigned'}"
            state = {"codes_ptr": "*u8", "scale_ptr": scale, "power_ptr": power}
            found = {"values_ptr": "*fp32", "codes_table": "*i32", "powers_table": "*fp32", "rows_table": "*i32"}
            keys = {"n": "i64", "k0": "i32", "k1": "i32", "flip": "i32", "offset": "i32"}
            for dither, how in ((False, "nearest"), (True, "at random")):
                signature, fixed = {"x_ptr": "*fp32"} | state | found | keys, constants | {"DITHER": dither}
                cases.append((f"encode {label} {how}", _encode, signature, fixed, NUM_WARPS))
            signature = state | {"values_ptr": "*fp32", "out_ptr": "*fp32", "n": "i64"}
            cases.append((f"decode {label}", _decode, signature, constants, NUM_WARPS))
    return cases
