"""The 8-bit codecs in Triton: a state encoded or decoded, a tile a program. What a tile is: tiles.py."""

# A jit function is called with launch options, and with plain numbers where it declares constants.
# pyright: reportCallIssue=false, reportArgumentType=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowmem.kernels._device import grouped_word, load_fp32
from hf_lowmem.kernels.codecs import tables
from hf_lowmem.kernels.codecs.dither import even
from hf_lowmem.kernels.codecs.tiles import (
    NUM_WARPS,
    NUMBERS,
    ROWS,
    TILE,
    WIDTH,
    decode_tile,
    encode_tile,
    tile_offsets,
)
from hf_lowmem.kernels.exact import GROUP, all_seed_keys, seed_keys

LAUNCH: dict[str, object] = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}


@triton.jit(do_not_specialize=["k0", "k1", "flip", "groups", "inside"])
def _encode(
    x_ptr,
    codes_ptr,
    scale_ptr,
    power_ptr,
    codes_table,
    places_table,
    powers_table,
    rows_table,
    n,
    k0,
    k1,
    flip,
    groups,
    inside,
    CODEC: tl.constexpr,
    SIGNED: tl.constexpr,
    DITHER: tl.constexpr,
    EVEN: tl.constexpr,
):
    """groups, inside: the index of the first value, GROUP * groups + inside."""
    start = tl.program_id(0).to(tl.int64) * (ROWS * WIDTH)
    left = tl.minimum(n - start, ROWS * WIDTH).to(tl.int32)
    local = tile_offsets()
    x = load_fp32(x_ptr + start + local, None if EVEN else local < left)
    word = grouped_word(start + local + inside, groups.to(tl.uint32), k0, k1) ^ flip.to(tl.uint32)
    encode_tile(
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
        CODEC,
        SIGNED,
        DITHER,
        EVEN,
    )


@triton.jit
def _decode(
    codes_ptr,
    scale_ptr,
    power_ptr,
    values_ptr,
    out_ptr,
    n,
    CODEC: tl.constexpr,
    SIGNED: tl.constexpr,
    EVEN: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * (ROWS * WIDTH)
    left = tl.minimum(n - start, ROWS * WIDTH).to(tl.int32)
    x = decode_tile(codes_ptr, scale_ptr, power_ptr, values_ptr, start, left, CODEC, SIGNED, EVEN)
    local = tile_offsets()
    tl.store(out_ptr + start + local, x, mask=None if EVEN else local < left)


def state_keys(seed: int) -> tuple[int, int, int]:
    """Kernel arguments for a state's seed: the two keys of its pair of steps, and -1 in the mirrored step, else 0."""
    return (*seed_keys(even(seed)), -(seed & 1))


def all_state_keys(seeds: Sequence[int]) -> list[list[int]]:
    """`state_keys` of each seed."""
    keys = all_seed_keys([even(seed) for seed in seeds])
    return [[*two, -(seed & 1)] for two, seed in zip(keys, seeds, strict=True)]


def as_int32(index: int) -> int:
    """An index modulo 2**32, as the int32 of the same bits."""
    return ((index & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def tables_of(codec: str, signed: bool, dither: bool, device: torch.device) -> tuple[Tensor, ...]:
    """(values, codes, places, powers, rows) on `device`. What a codec has not got is another of its tables, never
    read."""
    if codec == "int8":
        values, places = (t[signed].on(device) for t in (tables.MAPS, tables.DYNAMIC_PLACES))
        codes = tables.DYNAMIC_CODES[signed, not dither].on(device)
        return values, codes, places, codes, codes
    if codec == "int8_softsign":
        values, places = tables.SOFTSIGN_VALUES[signed].on(device), tables.SOFTSIGN_PLACES.on(device)
        codes = tables.SOFTSIGN_CODES[not dither].on(device)
        return values, codes, places, codes, codes
    values, powers = tables.EXPANDED_VALUES.on(device), tables.POWERS[signed].on(device)
    codes, places = tables.EXPANDING_TABLE.on(device), tables.EXPANDING_CELLS[signed].on(device)
    return values, codes, places, powers, tables.EXPANDING_ROWS[not dither].on(device)


def encode_state(
    value: Tensor, codes: Tensor, scalars: list[Tensor], codec: str, signed: bool, seed: int | None, offset: int
) -> None:
    if value.numel() == 0:
        return
    found = tables_of(codec, signed, seed is not None, value.device)[1:]
    _encode[(triton.cdiv(value.numel(), TILE),)](
        value.contiguous(),
        codes,
        scalars[0],
        scalars[-1],
        *found,
        value.numel(),
        *state_keys(seed or 0),
        as_int32(offset // GROUP),
        offset % GROUP,
        NUMBERS[codec],
        signed,
        seed is not None,
        value.numel() % TILE == 0,
        **LAUNCH,
    )


def decode_state(codes: Tensor, scalars: list[Tensor], codec: str, signed: bool) -> Tensor:
    out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    if codes.numel() == 0:
        return out
    values = tables_of(codec, signed, False, codes.device)[0]
    _decode[(triton.cdiv(codes.numel(), TILE),)](
        codes,
        scalars[0],
        scalars[-1],
        values,
        out,
        codes.numel(),
        NUMBERS[codec],
        signed,
        codes.numel() % TILE == 0,
        **LAUNCH,
    )
    return out


def compile_cases() -> list[tuple[str, object, dict[str, str], dict[str, object], int]]:
    """(label, function, signature, constexprs, warps) of every variant, for compilation ahead of time."""
    cases: list[tuple[str, object, dict[str, str], dict[str, object], int]] = []
    for codec, number in list(NUMBERS.items())[1:]:
        for signed in (True, False):
            scale = "*bf16" if codec == "int8_softsign" and signed else "*fp32"
            power = scale if codec != "fp8_expand" else "*u8"
            constants: dict[str, object] = {"CODEC": number, "SIGNED": signed, "EVEN": True}
            label = f"{codec} {'signed' if signed else 'unsigned'}"
            state = {"codes_ptr": "*u8", "scale_ptr": scale, "power_ptr": power}
            found = {"codes_table": "*i32", "places_table": "*fp32", "powers_table": "*i32", "rows_table": "*i32"}
            keys = {"n": "i32:16"} | dict.fromkeys(("k0", "k1", "flip", "groups", "inside"), "i32")
            for dither, how in ((False, "nearest"), (True, "at random")):
                signature, fixed = {"x_ptr": "*fp32"} | state | found | keys, constants | {"DITHER": dither}
                cases.append((f"encode {label} {how}", _encode, signature, fixed, NUM_WARPS))
            signature = state | {"values_ptr": "*fp32", "out_ptr": "*fp32", "n": "i32:16"}
            cases.append((f"decode {label}", _decode, signature, constants, NUM_WARPS))
    return cases
