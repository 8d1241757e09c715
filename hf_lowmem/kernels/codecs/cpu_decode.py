"""The 8-bit codecs' decoders on a CPU, a tile at a time, and the numbers by which compiled code knows the codecs."""

import numpy as np

from hf_lowmem.kernels._cpu import (
    TILE,
    add,
    bytes_at,
    called,
    float32,
    floats_at,
    halves_at,
    inlined,
    int8,
    int32,
    look_up,
    part,
    tile_at,
    widened,
    zero_from,
)
from hf_lowmem.kernels.codecs import reference

NUMBERS = {name: i for i, name in enumerate(("fp32", *reference.CODECS))}
FP32, INT8, SOFTSIGN, EXPAND = (NUMBERS[name] for name in ("fp32", "int8", "int8_softsign", "fp8_expand"))
BLOCKS = {"fp32": TILE} | {name: codec.block for name, codec in reference.CODECS.items()}
INT8_BLOCK, SOFTSIGN_BLOCK, EXPAND_BLOCK = (BLOCKS[name] for name in ("int8", "int8_softsign", "fp8_expand"))


@inlined
def softsign_value(code):
    """The value of a signed code: softness * y / (1 + softness - |y|) of y = code / 127, in integers that fp32 holds.

    Rounded once, it is what the table has: for all codes, says a test.
    """
    steps = float32(code)
    return steps * float32(3.0) / (float32(2921.0) - np.abs(steps) * float32(20.0))


@inlined
def decode_block(codes, values, row, scale, x):
    for j in range(len(x)):
        x[j] = look_up(values, add(row, int32(codes[j]))) * scale


@inlined
def decode_softsign(codes, scale, x):
    for j in range(len(x)):
        x[j] = softsign_value(int32(int8(codes[j]))) * scale


@called
def decode_tile(how, address, start, count, values, room, x):
    """The values of a tile, zeros beyond `count`. `room`: for a ragged tile's codes; the rest as for `encode_tile`."""
    codec, signed, _ = how
    if codec == FP32:
        return tile_at(address[0], start, count, x)
    codes = bytes_at(address[0] + start, TILE)
    if count < TILE:
        for j in range(count):
            room[j] = codes[j]
        codes = room
    if codec == INT8:
        first, blocks = start // INT8_BLOCK, (count + INT8_BLOCK - 1) // INT8_BLOCK
        scales = floats_at(address[1] + 4 * first, blocks)
        for b in range(blocks):
            decode_block(
                part(codes, b * INT8_BLOCK, INT8_BLOCK),
                values,
                int32(0),
                scales[b],
                part(x, b * INT8_BLOCK, INT8_BLOCK),
            )
    elif codec == SOFTSIGN:
        first, blocks = start // SOFTSIGN_BLOCK, (count + SOFTSIGN_BLOCK - 1) // SOFTSIGN_BLOCK
        for b in range(blocks):
            here, out = part(codes, b * SOFTSIGN_BLOCK, SOFTSIGN_BLOCK), part(x, b * SOFTSIGN_BLOCK, SOFTSIGN_BLOCK)
            if signed:
                decode_softsign(here, widened(halves_at(address[1] + 2 * (first + b), 1)[0]), out)
            else:
                decode_block(here, values, int32(0), floats_at(address[1] + 4 * (first + b), 1)[0], out)
    else:
        first, blocks = start // EXPAND_BLOCK, (count + EXPAND_BLOCK - 1) // EXPAND_BLOCK
        scales = floats_at(address[1] + 4 * first, blocks)
        stored = bytes_at(address[2] + first, blocks)
        for b in range(blocks):
            row = int32(256 * int(stored[b]))
            decode_block(
                part(codes, b * EXPAND_BLOCK, EXPAND_BLOCK),
                values,
                row,
                scales[b],
                part(x, b * EXPAND_BLOCK, EXPAND_BLOCK),
            )
    if count < TILE:
        zero_from(x, count)
    return x
