"""The 8-bit codecs in plain torch, a span of blocks at a time. What the formulas mean: hf_lowmem/codecs/<name>.py.

Every operation is exact or one correctly rounded fp32 operation, so each device gives the same bits.

`u`, the last argument of an encoder, is None to round to the nearest code, or a threshold a value: see dither.py.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowmem.kernels.codecs.blocks import decode_blocks, encode_blocks, mark_nonzero, smallest_nonzero
from hf_lowmem.kernels.codecs.dither import Dither, round_between
from hf_lowmem.kernels.codecs.tables import (
    EXPANDED_VALUES,
    EXPANDING_ROWS,
    EXPANDING_TABLE,
    LARGEST_BITS,
    LARGEST_CODE,
    MAPS,
    NEAREST,
    POWER_OF_ONE,
    POWERS,
    SOFTNESS,
    SOFTSIGN_CODES,
    SOFTSIGN_VALUES,
    STEPS,
    DeviceTable,
)
from hf_lowmem.kernels.exact import BF16_MAX, FLOAT_MAX, round_bf16_up

# The smallest codes stand for 3.25e-7 (int8), 1.0e-3 and 2.6e-7 (softsign): times this still a normal fp32.
SMALLEST_SCALE = 2.0**-104
# fp8_expand. The least a: 2**-108 / 2**17.8 is a normal fp32. The least b: three binades of subnormal codes under it,
# at the smallest k, end at 2**-116 / 2**(3 / 0.297) = 2**-126, so whatever is decoded is normal too.
SMALLEST_A = 2.0**-108
SMALLEST_B = 2.0**-116


def look_up(table: Tensor, codes: Tensor) -> Tensor:
    """table[codes], a fresh tensor of `codes`' shape."""
    return table.index_select(0, codes.view(-1).int()).view(codes.shape)


def int8_encode(x: Tensor, signed: bool, u: Tensor | None) -> tuple[Tensor, ...]:
    high = x.amax(1)
    if signed:
        low = x.amin(1).neg_()
        scale = torch.where(high >= low, high.clamp(min=SMALLEST_SCALE), low.clamp(min=SMALLEST_SCALE).neg_())
    else:
        scale = high.clamp(min=SMALLEST_SCALE)
    q = x.div(scale[:, None])
    bits = q.view(torch.int32).view(-1)
    found = NEAREST[signed].on(x.device).index_select(0, bits.bitwise_right_shift(16).bitwise_and_(0xFFFF))
    found.add_(bits.bitwise_and(0xFFFF)).bitwise_right_shift_(16)
    if signed:
        found.bitwise_xor_(bits.bitwise_right_shift(31)).bitwise_and_(0xFF)
    found = found.view_as(x)
    if u is not None:
        found = round_between(q, found, lambda codes: look_up(MAPS[signed].on(x.device), codes), 255, u, signed)
    codes = found.to(torch.uint8)
    return codes if signed else torch.maximum(codes, mark_nonzero(x)), scale


def int8_decode(codes: Tensor, scalars: tuple[Tensor, ...], signed: bool) -> Tensor:
    return look_up(MAPS[signed].on(codes.device), codes).mul_(scalars[0][:, None])


def softsign_encode(x: Tensor, signed: bool, u: Tensor | None) -> tuple[Tensor, ...]:
    table = SOFTSIGN_VALUES[signed].on(x.device)
    if signed:
        magnitude = x.abs()
        scale = round_bf16_up(magnitude.amax(1).clamp_(SMALLEST_SCALE, BF16_MAX))
        q = magnitude.div_(scale[:, None])
        found = q.mul((1 + SOFTNESS) * STEPS[True]).div_(q.add(SOFTNESS)).round_().int().clamp_(0, STEPS[True])
        if u is not None:
            found = round_between(q, found, lambda codes: look_up(table, codes), STEPS[True], u, signed)
        below = x.view(torch.int32).bitwise_right_shift(31)  # -1 for a negative x, else 0
        return found.bitwise_xor_(below).sub_(below).to(torch.int8).view(torch.uint8), scale
    scale = x.amax(1).clamp_(SMALLEST_SCALE, FLOAT_MAX)
    q = x.div(scale[:, None])
    bits = q.view(torch.int32).view(-1)
    found = SOFTSIGN_CODES.on(x.device).index_select(0, bits.bitwise_right_shift(16).bitwise_and_(0x7FFF))
    found = found.add_(bits.bitwise_and(0xFFFF)).bitwise_right_shift_(16).view_as(x)
    if u is not None:
        found = round_between(q, found, lambda codes: look_up(table, codes), STEPS[False], u, signed)
    return torch.maximum(found.to(torch.uint8), mark_nonzero(x)), scale


def softsign_decode(codes: Tensor, scalars: tuple[Tensor, ...], signed: bool) -> Tensor:
    return look_up(SOFTSIGN_VALUES[signed].on(codes.device), codes).mul_(scalars[0].float()[:, None])


def expand_encode(x: Tensor, signed: bool, u: Tensor | None) -> tuple[Tensor, ...]:
    magnitude = x.abs() if signed else x
    a = magnitude.amax(1).clamp_(SMALLEST_A, FLOAT_MAX)
    b = smallest_nonzero(magnitude).clamp_(min=SMALLEST_B)
    below = torch.searchsorted(POWERS[signed].on(x.device), a.div(b), out_int32=True)
    power = below.neg_().add_(255)
    if signed:
        power.clamp_(min=POWER_OF_ONE)
    shift, first, offset = EXPANDING_ROWS.on(x.device).index_select(0, power).unsqueeze(-1).unbind(1)
    q = magnitude.div(a[:, None])
    bits = q.view(torch.int32)
    bits = torch.maximum(bits, first).clamp_(max=LARGEST_BITS)
    place = bits.bitwise_right_shift(shift).add_(offset)
    found = EXPANDING_TABLE.on(x.device).index_select(0, place.view(-1)).view(x.shape)
    found.add_(bits).bitwise_right_shift_(shift)
    if u is not None:
        table, row = EXPANDED_VALUES.on(x.device), power.int().mul(256)[:, None]
        found = round_between(q, found, lambda codes: look_up(table, codes.add(row)), LARGEST_CODE, u, signed)
    codes = found.to(torch.uint8)
    if u is None or not signed:
        codes = torch.maximum(codes, mark_nonzero(magnitude))
    if signed:
        codes.bitwise_or_(x.view(torch.int32).bitwise_right_shift(24).bitwise_and_(0x80).to(torch.uint8))
    return codes, a, power.to(torch.uint8)


def expand_decode(codes: Tensor, scalars: tuple[Tensor, ...], signed: bool) -> Tensor:
    a, power = scalars
    where = codes.int().add_(power.int().mul_(256)[:, None])
    return look_up(EXPANDED_VALUES.on(codes.device), where).mul_(a.float()[:, None])


class RowCodec(NamedTuple):
    """One codec: values in a block, dtypes of its scalars (of signed states, of unsigned ones), the two functions on
    rows, the tables that they look up."""

    block: int
    scalars: dict[bool, tuple[torch.dtype, ...]]
    encode: Callable[[Tensor, bool, Tensor | None], tuple[Tensor, ...]]
    decode: Callable[[Tensor, tuple[Tensor, ...], bool], Tensor]
    tables: Callable[[bool], tuple[DeviceTable, ...]]


CODECS: dict[str, RowCodec] = {
    "int8": RowCodec(
        256,
        {True: (torch.float32,), False: (torch.float32,)},
        int8_encode,
        int8_decode,
        lambda signed: (MAPS[signed], NEAREST[signed]),
    ),
    "int8_softsign": RowCodec(
        64,
        {True: (torch.bfloat16,), False: (torch.float32,)},
        softsign_encode,
        softsign_decode,
        lambda signed: (SOFTSIGN_VALUES[signed],) if signed else (SOFTSIGN_VALUES[signed], SOFTSIGN_CODES),
    ),
    "fp8_expand": RowCodec(
        128,
        dict.fromkeys((True, False), (torch.float32, torch.uint8)),
        expand_encode,
        expand_decode,
        lambda signed: (EXPANDED_VALUES, POWERS[signed], EXPANDING_ROWS, EXPANDING_TABLE),
    ),
}


def encode_state(
    value: Tensor, codes: Tensor, scalars: Sequence[Tensor], codec: str, signed: bool, seed: int | None, offset: int
) -> None:
    """Encode `value` (fp32, any strides) over `codes` (uint8, of its shape) and `scalars` (n_blocks,) each.

    Without a seed to the nearest codes; with one at random, see `Dither`.
    """
    rows, dither = CODECS[codec], None if seed is None else Dither(seed, offset)
    encode_blocks(value, codes, scalars, rows=rows.encode, block=rows.block, signed=signed, dither=dither)


def decode_state(codes: Tensor, scalars: Sequence[Tensor], codec: str, signed: bool) -> Tensor:
    """The values as a fresh contiguous fp32 tensor of `codes`' shape."""
    rows = CODECS[codec]
    return decode_blocks(codes, scalars, codes.shape, rows=rows.decode, block=rows.block, signed=signed)


def decode_state_fake(codes: Tensor, scalars: Sequence[Tensor], codec: str, signed: bool) -> Tensor:
    return torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
