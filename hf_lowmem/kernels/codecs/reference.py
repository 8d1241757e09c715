"""The 8-bit codecs in plain torch, a span of blocks at a time. What the formulas mean: hf_lowmem/codecs/<name>.py.

Every operation is exact or one correctly rounded fp32 operation, so each device gives the same bits.

`words`, the last argument of an encoder, is None to round to the nearest code, or random bits for each value, int32:
see dither.py.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowmem.kernels.codecs.blocks import decode_blocks, encode_blocks, mark_nonzero, smallest_nonzero
from hf_lowmem.kernels.codecs.dither import Dither, cell_code_at, code_at, round_up
from hf_lowmem.kernels.codecs.tables import (
    DYNAMIC_CODES,
    DYNAMIC_PLACES,
    EXPANDED_VALUES,
    EXPANDING_CELLS,
    EXPANDING_ROWS,
    EXPANDING_TABLE,
    LARGEST_BITS,
    LOWEST,
    MAPS,
    ORIGIN,
    POWER_OF_ONE,
    POWERS,
    SOFTNESS,
    SOFTSIGN_CODES,
    SOFTSIGN_PLACES,
    SOFTSIGN_VALUES,
    STEPS,
    DeviceTable,
)
from hf_lowmem.kernels.exact import BF16_MAX, FLOAT_MAX, fma, round_bf16_up

# The smallest codes stand for 3.25e-7 (int8), 1.0e-3 and 2.6e-7 (softsign): times this still a normal fp32.
SMALLEST_SCALE = 2.0**-104
# fp8_expand. The least a: 2**-108 / 2**17.8 is a normal fp32. The least b: three binades of subnormal codes under it,
# at the smallest k, end at 2**-116 / 2**(3 / 0.297) = 2**-126, so whatever is decoded is normal too.
SMALLEST_A = 2.0**-108
SMALLEST_B = 2.0**-116


def _fp32(number: float) -> float:
    return torch.tensor(number, dtype=torch.float32, device="cpu").item()


# `softsign_encode`, signed: D is 127 (1 + c), less 2**-20, so that no place is above 127 however the operations round,
# and as an fp32 the inverse of OFFSET, so that the place of 0 is 0. SLOPE is 1 / (D c), OFFSET that times c.
SLOPE = _fp32(1 / ((1 + SOFTNESS) * STEPS[True] * (1 - 2.0**-20) * SOFTNESS))
OFFSET = _fp32(SLOPE * SOFTNESS)
FARTHEST = _fp32(1 / OFFSET)


def look_up(table: Tensor, codes: Tensor) -> Tensor:
    """table[codes], a fresh tensor of `codes`' shape."""
    return table.index_select(0, codes.view(-1).int()).view(codes.shape)


def inverse(scale: Tensor) -> Tensor:
    """1 / scale beside each row, a normal fp32 up to scales of 2**126: one division a block, not one a value.

    Divided by 2**8 first, so that a kernel's reciprocal meets no scale above 2**120.
    """
    return scale.mul(2.0**-8).reciprocal_().mul_(2.0**-8)[:, None]


def int8_encode(x: Tensor, signed: bool, words: Tensor | None) -> tuple[Tensor, ...]:
    high = x.amax(1)
    if signed:
        low = x.amin(1).neg_()
        scale = torch.where(high >= low, high.clamp(min=SMALLEST_SCALE), low.clamp(min=SMALLEST_SCALE).neg_())
    else:
        scale = high.clamp(min=SMALLEST_SCALE)
    q = x.mul(inverse(scale))
    bits = q.view(torch.int32).view(-1)
    table = DYNAMIC_CODES[signed, words is None].on(x.device)
    found = table.index_select(0, bits.bitwise_right_shift(16).bitwise_and_(0xFFFF))
    found.add_(bits.bitwise_and(0xFFFF)).bitwise_right_shift_(16)
    if signed:
        found.bitwise_xor_(bits.bitwise_right_shift(31)).bitwise_and_(0xFF)
    found = found.view_as(x)
    if words is not None:
        found = round_up(q.clamp_(min=LOWEST), found, DYNAMIC_PLACES[signed].on(x.device), words)
    codes = found.to(torch.uint8)
    return codes if signed else torch.maximum(codes, mark_nonzero(x)), scale


def int8_decode(codes: Tensor, scalars: tuple[Tensor, ...], signed: bool) -> Tensor:
    return look_up(MAPS[signed].on(codes.device), codes).mul_(scalars[0][:, None])


def softsign_encode(x: Tensor, signed: bool, words: Tensor | None) -> tuple[Tensor, ...]:
    """Signed, the place among the codes is y = (1 + c) 127 q / (q + c) = D - 1 / b, with D = (1 + c) 127 and
    b = (q + c) / (D c). A value whose place is t beyond a code's is itself f = t - t (1 - t) b of the way to the next.
    """
    if signed:
        size = x.abs()
        largest = size.amax(1)
        scale = round_bf16_up(largest.clamp(SMALLEST_SCALE, BF16_MAX))
        # At random what is beyond bf16's range counts as 1: a code too many would be another sign.
        slope = inverse(scale if words is None else torch.maximum(scale, largest)).mul_(SLOPE)
        b = fma(size, slope, size.new_tensor(OFFSET))
        y = b.reciprocal().neg_().add_(FARTHEST)
        if words is None:
            return y.round_().clamp_(max=STEPS[True]).copysign_(x).to(torch.int8).view(torch.uint8), scale
        t = y - y.floor()
        y = fma(b.neg_(), fma(-t, t, t), y).copysign_(x)
        return code_at(y.add_(ORIGIN), words).to(torch.uint8), scale
    scale = x.amax(1).clamp_(SMALLEST_SCALE, FLOAT_MAX)
    q = x.mul(inverse(scale))
    bits = q.view(torch.int32).view(-1)
    table = SOFTSIGN_CODES[words is None].on(x.device)
    found = table.index_select(0, bits.bitwise_right_shift(16).bitwise_and_(0x7FFF))
    found = found.add_(bits.bitwise_and(0xFFFF)).bitwise_right_shift_(16).view_as(x)
    if words is not None:
        found = round_up(q, found, SOFTSIGN_PLACES.on(x.device), words)
    return torch.maximum(found.to(torch.uint8), mark_nonzero(x)), scale


def softsign_decode(codes: Tensor, scalars: tuple[Tensor, ...], signed: bool) -> Tensor:
    return look_up(SOFTSIGN_VALUES[signed].on(codes.device), codes).mul_(scalars[0].float()[:, None])


def expand_encode(x: Tensor, signed: bool, words: Tensor | None) -> tuple[Tensor, ...]:
    magnitude = x.abs() if signed else x
    a = magnitude.amax(1).clamp_(SMALLEST_A, FLOAT_MAX)
    b = smallest_nonzero(magnitude).clamp_(min=SMALLEST_B)
    ratio = inverse(b).view(-1).mul_(a).view(torch.int32)
    below = POWERS[signed].on(x.device).index_select(0, ratio.bitwise_right_shift(16).bitwise_and_(0x7FFF))
    power = below.add_(ratio.bitwise_and_(0xFFFF)).bitwise_right_shift_(16).neg_().add_(255)
    if signed:
        power.clamp_(min=POWER_OF_ONE)
    nearest = words is None
    shift, first, offset = EXPANDING_ROWS[nearest].on(x.device).index_select(0, power).unsqueeze(-1).unbind(1)
    q = magnitude.mul(inverse(a))
    bits = torch.maximum(q.view(torch.int32), first).clamp_(max=LARGEST_BITS)
    where = bits.bitwise_right_shift(shift).add_(offset).view(-1)
    if words is None:
        found = EXPANDING_TABLE.on(x.device).index_select(0, where).view(x.shape)
        found.add_(bits).bitwise_right_shift_(shift)
    else:
        cells = EXPANDING_CELLS[signed].on(x.device).index_select(0, where)
        start, slope, bend, anchor = cells.view(*x.shape, 4).unbind(-1)
        d = q.sub_(anchor)
        place = fma(d.clamp(max=0.0), bend, fma(d, slope, start))
        found = cell_code_at(place, words, None if signed else x.view(torch.int32).clamp(max=1))
    codes = found.to(torch.uint8)
    if nearest:
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
        lambda signed: (MAPS[signed], DYNAMIC_PLACES[signed], *(DYNAMIC_CODES[signed, near] for near in (True, False))),
    ),
    "int8_softsign": RowCodec(
        64,
        {True: (torch.bfloat16,), False: (torch.float32,)},
        softsign_encode,
        softsign_decode,
        lambda signed: (
            (SOFTSIGN_VALUES[signed],)
            if signed
            else (SOFTSIGN_VALUES[signed], SOFTSIGN_PLACES, *SOFTSIGN_CODES.values())
        ),
    ),
    "fp8_expand": RowCodec(
        128,
        dict.fromkeys((True, False), (torch.float32, torch.uint8)),
        expand_encode,
        expand_decode,
        lambda signed: (
            EXPANDED_VALUES,
            POWERS[signed],
            EXPANDING_CELLS[signed],
            EXPANDING_TABLE,
            *EXPANDING_ROWS.values(),
        ),
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
