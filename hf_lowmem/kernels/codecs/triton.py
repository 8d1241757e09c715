"""The 8-bit codecs in Triton: what one program encodes or decodes is a tile of whole blocks.

A tile is (ROWS, 64): 64 divides the blocks of all codecs, and a block of 128 or 256 is two or four rows. An extreme is
taken along the rows first, where most of the work is, then across the few rows of a block.

The fused optimizers call `encode_tile` and `decode_tile` on values that never leave the registers.
"""

# A jit function is called with launch options, and with plain numbers where it declares constants.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowmem.kernels._device import bits_of, div, from_bits, magnitude, round_bf16, round_nearest
from hf_lowmem.kernels.codecs import reference, tables

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
POWER_OF_ONE: tl.constexpr = tl.constexpr(tables.POWER_OF_ONE)
LARGEST_BITS: tl.constexpr = tl.constexpr(tables.LARGEST_BITS)
NO_VALUE: tl.constexpr = tl.constexpr(0x7F7FFFFE)


@triton.jit
def rows_of_a_block(CODEC: tl.constexpr):
    """How many rows of 64 a block has."""
    return 4 if CODEC == INT8 else (1 if CODEC == SOFTSIGN else 2)


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
        GROUP: tl.constexpr = rows_of_a_block(CODEC)
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
def encode_tile(
    x,
    codes_ptr,
    scale_ptr,
    power_ptr,
    codes_table,
    powers_table,
    rows_table,
    start,
    left,
    CODEC: tl.constexpr,
    SIGNED: tl.constexpr,
):
    """Write the codes and scalars of x, fp32 (ROWS, WIDTH) that is zero from `left` on, where the tile belongs."""
    local = tile_offsets()
    mask = local < left
    if CODEC == FP32:
        tl.store(codes_ptr + start + local, x, mask=mask)
    else:
        GROUP: tl.constexpr = rows_of_a_block(CODEC)
        block = tl.arange(0, ROWS // GROUP)
        inside = block * (GROUP * WIDTH) < left
        first = start // (GROUP * WIDTH)
        if CODEC == INT8:
            codes, scale = _int8_codes(x, codes_table, GROUP, SIGNED)
            tl.store(scale_ptr + first + block, scale, mask=inside)
        else:
            size = magnitude(x)
            top = from_bits(largest(size, GROUP).to(tl.uint32))
            if CODEC == SOFTSIGN:
                scale = round_bf16(tl.minimum(tl.maximum(top, SMALLEST_SCALE), BF16_MAX))
                codes = _softsign_codes(x, spread(scale, GROUP), codes_table, SIGNED)
            else:
                scale = round_bf16(tl.minimum(tl.maximum(top, SMALLEST_A), BF16_MAX))
                least = tl.minimum(smallest((size - 1) & 0x7FFFFFFF, GROUP), NO_VALUE) + 1
                power = _power(scale, from_bits(least.to(tl.uint32)), powers_table, SIGNED)
                codes = _expand_codes(from_bits(size.to(tl.uint32)), scale, power, codes_table, rows_table, GROUP)
                tl.store(power_ptr + first + block, power.to(tl.uint8), mask=inside)
            half = (bits_of(scale) >> 16).to(tl.uint16)
            tl.store((scale_ptr + first + block).to(tl.pointer_type(tl.uint16), bitcast=True), half, mask=inside)
        if CODEC == EXPAND or not SIGNED:
            codes = tl.maximum(codes, (magnitude(x) != 0).to(tl.int32))
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
    bits = bits_of(div(x, spread(scale, GROUP)))
    codes = _find(table, bits >> 16, (bits & 0xFFFF).to(tl.int32), 16)
    if SIGNED:
        codes ^= bits.to(tl.int32, bitcast=True) >> 31
    return codes & 0xFF, scale


@triton.jit
def _softsign_codes(x, scale, table, SIGNED: tl.constexpr):
    u = div(x, scale)
    if SIGNED:
        codes = round_nearest(div(u * STRETCH, tl.abs(u) + SOFTNESS)) & 0xFF
    else:
        bits = bits_of(u)
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
def _expand_codes(size, a, power, table, rows, GROUP: tl.constexpr):
    shift = spread(tl.load(rows + power * 3), GROUP)
    first = spread(tl.load(rows + power * 3 + 1), GROUP)
    offset = spread(tl.load(rows + power * 3 + 2), GROUP)
    bits = bits_of(div(size, spread(a, GROUP))).to(tl.int32, bitcast=True)
    bits = tl.minimum(tl.maximum(bits, first), LARGEST_BITS)
    return _find(table, (bits >> shift) + offset, bits, shift)


@triton.jit
def _encode(
    x_ptr,
    codes_ptr,
    scale_ptr,
    power_ptr,
    codes_table,
    powers_table,
    rows_table,
    n,
    CODEC: tl.constexpr,
    SIGNED: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * (ROWS * WIDTH)
    left = tl.minimum(n - start, ROWS * WIDTH).to(tl.int32)
    local = tile_offsets()
    x = tl.load(x_ptr + start + local, mask=local < left, other=0.0)
    encode_tile(x, codes_ptr, scale_ptr, power_ptr, codes_table, powers_table, rows_table, start, left, CODEC, SIGNED)


@triton.jit
def _decode(codes_ptr, scale_ptr, power_ptr, values_ptr, out_ptr, n, CODEC: tl.constexpr, SIGNED: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * (ROWS * WIDTH)
    left = tl.minimum(n - start, ROWS * WIDTH).to(tl.int32)
    x = decode_tile(codes_ptr, scale_ptr, power_ptr, values_ptr, start, left, CODEC, SIGNED)
    local = tile_offsets()
    tl.store(out_ptr + start + local, x, mask=local < left)


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


def encode_state(value: Tensor, codes: Tensor, scalars: list[Tensor], codec: str, signed: bool) -> None:
    if value.numel() == 0:
        return
    _, codes_table, powers, rows = tables_of(codec, signed, value.device)
    _encode[(triton.cdiv(value.numel(), TILE),)](
        value.contiguous(),
        codes,
        scalars[0],
        scalars[-1],
        codes_table,
        powers,
        rows,
        value.numel(),
        NUMBERS[codec],
        signed,
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
        scale = "*fp32" if codec == "int8" else "*bf16"
        power = scale if codec != "fp8_expand" else "*u8"
        for signed in (True, False):
            constants: dict[str, object] = {"CODEC": number, "SIGNED": signed}
            label = f"{codec} {'signed' if signed else 'unsigned'}"
            state = {"codes_ptr": "*u8", "scale_ptr": scale, "power_ptr": power}
            found = {"codes_table": "*i32", "powers_table": "*fp32", "rows_table": "*i32", "n": "i64"}
            cases.append((f"encode {label}", _encode, {"x_ptr": "*fp32"} | state | found, constants, NUM_WARPS))
            signature = state | {"values_ptr": "*fp32", "out_ptr": "*fp32", "n": "i64"}
            cases.append((f"decode {label}", _decode, signature, constants, NUM_WARPS))
    return cases
