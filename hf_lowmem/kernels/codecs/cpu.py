"""The 8-bit codecs on a CPU: a tensor's tiles, shared by threads. Formulas: cpu_encode.py, cpu_decode.py."""

import numpy as np
import torch
from torch import Tensor

from hf_lowmem.kernels._cpu import (
    TILE,
    float32,
    floats_at,
    in_parts,
    kernel,
    put_back,
    random_words,
    tile_at,
    uint8,
    uint32,
)
from hf_lowmem.kernels.codecs import tables
from hf_lowmem.kernels.codecs.cpu_decode import NUMBERS, decode_tile
from hf_lowmem.kernels.codecs.cpu_encode import encode_tile, make_room
from hf_lowmem.kernels.codecs.dither import even
from hf_lowmem.kernels.exact import seed_keys


@kernel
def _encode(tile, last, n, value, address, how, keys, offset, tables):
    room = make_room()
    ragged, words = np.empty(TILE, float32), np.zeros(TILE, uint32)
    while tile < last:
        start = tile * TILE
        count = min(n - start, TILE)
        x = tile_at(value, start, count, ragged)
        if how[2]:
            random_words(offset + start, keys[0], keys[1], keys[2], words)
        encode_tile(x, words, how, address, start, count, tables, room)
        tile += 1


@kernel
def _decode(tile, last, n, out, address, how, values):
    x, room = np.empty(TILE, float32), np.zeros(TILE, uint8)
    while tile < last:
        start = tile * TILE
        count = min(n - start, TILE)
        whole = floats_at(out + 4 * start, TILE) if count == TILE else x
        put_back(decode_tile(how, address, start, count, values, room, whole), out, start, count)
        tile += 1


def state_keys(seed: int) -> tuple[int, int, int]:
    """Numbers that stand for a state's seed in a kernel: the keys of the pair, and all ones for its mirrored step."""
    return (*seed_keys(even(seed)), -(seed & 1))


def words_of(*numbers: int) -> tuple[np.uint32, ...]:
    """Integers modulo 2**32."""
    return tuple(uint32(number & 0xFFFFFFFF) for number in numbers)


def tables_of(codec: str, signed: bool, dither: bool) -> tuple[np.ndarray, ...]:
    """values, codes, places, powers, rows. What a codec has not got is another codec's, never read."""
    cpu, nearest = torch.device("cpu"), not dither
    values, codes, places = tables.MAPS[signed], tables.DYNAMIC_CODES[signed, nearest], tables.DYNAMIC_PLACES[signed]
    if codec == "int8_softsign":
        values, codes = tables.SOFTSIGN_VALUES[signed], tables.SOFTSIGN_CODES[nearest]
        places = tables.SOFTSIGN_PLACES
    elif codec == "fp8_expand":
        values, codes, places = tables.EXPANDED_VALUES, tables.EXPANDING_TABLE, tables.EXPANDING_CELLS[signed]
    found = (table.on(cpu).numpy() for table in (values, codes, places, tables.POWERS[signed]))
    values, codes, places, powers = (table.reshape(-1) for table in found)
    return values, codes, places, powers, tables.EXPANDING_ROWS[nearest].on(cpu).numpy()


def addresses(parts: list[Tensor]) -> tuple[int, int, int]:
    """Addresses of a state's codes, scale and power; what a codec has not got is another of its tensors, never read."""
    return parts[0].data_ptr(), parts[min(1, len(parts) - 1)].data_ptr(), parts[-1].data_ptr()


def encode_state(
    value: Tensor, codes: Tensor, scalars: list[Tensor], codec: str, signed: bool, seed: int | None, offset: int
) -> None:
    value, n = value.contiguous(), value.numel()
    here, there = value.data_ptr(), addresses([codes, *scalars])
    how = NUMBERS[codec], signed, seed is not None
    keys, found = words_of(*state_keys(seed or 0)), tables_of(codec, signed, how[2])
    in_parts(lambda tile, last: _encode(tile, last, n, here, there, how, keys, offset, found), -(-n // TILE))


def decode_state(codes: Tensor, scalars: list[Tensor], codec: str, signed: bool) -> Tensor:
    out, n = torch.empty(codes.shape, dtype=torch.float32, device="cpu"), codes.numel()
    here, there, values = addresses([codes, *scalars]), out.data_ptr(), tables_of(codec, signed, False)[0]
    how = NUMBERS[codec], signed, False
    in_parts(lambda tile, last: _decode(tile, last, n, there, here, how, values), -(-n // TILE))
    return out
