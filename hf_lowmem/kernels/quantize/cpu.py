"""Group quantisation on a CPU: a group is read once, its codes are written once, and nothing is in between.

`encode_span` and `decode_span` are what the kernels of norms and gated units call, too. A span lies within one row of
the tensor, from the beginning of a group on: groups do not cross rows.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hf_lowmem.kernels._cpu import (
    TILE,
    add,
    bits_of,
    both,
    bytes_at,
    called,
    either,
    float32,
    floats_at,
    from_bits,
    halves_at,
    in_parts,
    inlined,
    int8,
    int32,
    kernel,
    left,
    load_floats,
    minus,
    part,
    plain_words,
    plus,
    right,
    round_to_nearest,
    shift_right,
    size_of,
    uint8,
    uint16,
    uint32,
    widened,
)
from hf_lowmem.kernels.codecs.cpu import words_of
from hf_lowmem.kernels.exact import seed_keys
from hf_lowmem.kernels.quantize.reference import GROUPS

E4M3, INT8 = range(2)
NUMBERS = {"e4m3": E4M3, "int8": INT8}
E4M3_GROUP, INT8_GROUP = (GROUPS[name].group for name in NUMBERS)
E4M3_TOP, INT8_TOP = (float32(GROUPS[name].top) for name in NUMBERS)
E4M3_LEAST, INT8_LEAST = (float32(GROUPS[name].least) for name in NUMBERS)
INFINITY, NAN = uint32(0x7F800000), uint16(0x7FC0)


@inlined
def _largest(x):
    """The bits of the largest |x|; of a nan, if there is one."""
    most = uint32(0)
    for j in range(len(x)):
        size = size_of(x[j])
        most = size if size > most else most
    return most


@inlined
def _between(x, top):
    """x within [-top, top]."""
    x = top if x > top else x
    return -top if x < -top else x


@inlined
def _e4m3_nearest(x, factor, codes):
    """Reference: `e4m3_codes`."""
    for j in range(len(x)):
        bits = bits_of(_between(x[j] * factor, E4M3_TOP))
        size = both(bits, uint32(0x7FFFFFFF))
        small = from_bits(size if size < uint32(0x3C800000) else uint32(0x3C800000))  # 2**-6
        low = both(bits_of(small * float32(512.0) + float32(12582912.0)), uint32(0xFF))  # 1.5 * 2**23
        odd = both(right(size, uint32(20)), uint32(1))
        high = minus(right(plus(plus(size, odd), uint32(0x7FFFF)), uint32(20)), uint32(960))
        code = low if size < uint32(0x3C800000) else high
        codes[j] = uint8(either(code, both(right(bits, uint32(24)), uint32(0x80))))


@inlined
def _e4m3_at_random(x, factor, words, codes):
    for j in range(len(x)):
        bits = bits_of(_between(x[j] * factor, E4M3_TOP))
        size, noise = both(bits, uint32(0x7FFFFFFF)), both(words[j], uint32(0xFFFFF))
        small = from_bits(size if size < uint32(0x3C800000) else uint32(0x3C800000))
        low = right(plus(uint32(int32(small * float32(536870912.0))), noise), uint32(20))  # 2**29
        high = minus(right(plus(size, noise), uint32(20)), uint32(960))
        code = low if size < uint32(0x3C800000) else high
        codes[j] = uint8(either(code, both(right(bits, uint32(24)), uint32(0x80))))


@inlined
def _int8_nearest(x, factor, codes):
    for j in range(len(x)):
        codes[j] = uint8(bits_of(_between(x[j] * factor, INT8_TOP) + float32(12582912.0)))


@inlined
def _int8_at_random(x, factor, words, codes):
    for j in range(len(x)):
        fine = int32(_between(x[j] * factor, INT8_TOP) * float32(16777216.0))  # 2**24
        codes[j] = uint8(shift_right(add(fine, int32(both(words[j], uint32(0xFFFFFF)))), int32(24)))


@inlined
def _clear(codes):
    for j in range(len(codes)):
        codes[j] = uint8(0)


@inlined
def _scale_of(largest, top, least, most):
    """The scale of a group, a bf16 as fp32. Reference: `Groups.scale_of`."""
    scale = from_bits(largest) / top
    scale = least if scale < least else scale
    scale = most if scale > most else scale
    return from_bits(both(plus(bits_of(scale), uint32(0xFFFF)), uint32(0xFFFF0000)))


@called
def encode_span(x, count, words, codes, scales, how):
    """Codes and scales of x[:count], written to the addresses `codes` and `scales`.

    how: the format's number, whether to round at random, by `words`, and the largest scale.
    """
    code, at_random, most = how
    size = INT8_GROUP if code == INT8 else E4M3_GROUP
    for start in range(0, count, size):
        width = min(size, count - start)
        here, out, of = (
            part(x, start, width),
            bytes_at(codes + start, width),
            halves_at(scales + 2 * (start // size), 1),
        )
        largest = _largest(here)
        if largest >= INFINITY:
            of[0] = NAN
            _clear(out)
            continue
        if code == INT8:
            scale = _scale_of(largest, INT8_TOP, INT8_LEAST, most)
        else:
            scale = _scale_of(largest, E4M3_TOP, E4M3_LEAST, most)
        of[0] = uint16(right(bits_of(scale), uint32(16)))
        factor = float32(1.0) / scale
        if code == INT8:
            if at_random:
                _int8_at_random(here, factor, part(words, start, width), out)
            else:
                _int8_nearest(here, factor, out)
        elif at_random:
            _e4m3_at_random(here, factor, part(words, start, width), out)
        else:
            _e4m3_nearest(here, factor, out)


@inlined
def _from_e4m3(codes, scale, out):
    """Values: 2**-8 of the code's times 2**8 of the scale. Reference: `_decode_e4m3`."""
    factor = scale * float32(256.0)
    for j in range(len(out)):
        code = uint32(codes[j])
        size = both(code, uint32(0x7F))
        high = plus(left(size, uint32(20)), uint32(0x38000000))  # 2**-15
        low = bits_of(float32(int32(size)) * float32(2.0**-17))
        bits = low if size < uint32(8) else high
        bits = uint32(0x7FC00000) if size == uint32(0x7F) else bits
        out[j] = from_bits(either(bits, left(both(code, uint32(0x80)), uint32(24)))) * factor


@inlined
def _from_int8(codes, scale, out):
    for j in range(len(out)):
        out[j] = float32(int32(int8(codes[j]))) * scale


@called
def decode_span(code, codes, scales, count, out):
    """The values of `count` codes from the address `codes` on, to out[:count]."""
    size = INT8_GROUP if code == INT8 else E4M3_GROUP
    for start in range(0, count, size):
        width = min(size, count - start)
        here, scale = bytes_at(codes + start, width), widened(halves_at(scales + 2 * (start // size), 1)[0])
        if code == INT8:
            _from_int8(here, scale, part(out, start, width))
        else:
            _from_e4m3(here, scale, part(out, start, width))


@kernel
def _quantize(row, last, x, bf16, layout, codes, scales, how, keys):
    length, groups, n = layout
    size = INT8_GROUP if how[0] == INT8 else E4M3_GROUP
    room, words = np.empty(TILE, float32), np.empty(TILE, uint32)
    while row < last:
        for column in range(0, min(length, n - row * length), TILE):
            start = row * length + column
            count = min(TILE, length - column, n - start)
            values = load_floats(bf16, x, start, count, room)
            if how[1]:
                plain_words(start, keys[0], keys[1], words)
            encode_span(values, count, words, codes + start, scales + 2 * (row * groups + column // size), how)
        row += 1


@kernel
def _dequantize(row, last, code, layout, codes, scales, out, bf16):
    length, groups, n = layout
    size = INT8_GROUP if code == INT8 else E4M3_GROUP
    room = np.empty(TILE, float32)
    while row < last:
        for column in range(0, min(length, n - row * length), TILE):
            start = row * length + column
            count = min(TILE, length - column, n - start)
            values = room if bf16 else floats_at(out + 4 * start, count)
            decode_span(code, codes + start, scales + 2 * (row * groups + column // size), count, values)
            if bf16:
                round_to_nearest(values, halves_at(out + 2 * start, count), count)
        row += 1


def layout_of(shape: torch.Size, group: int) -> tuple[int, int, int]:
    """Values of a row, its groups, and values in all. Where groups fill the rows they are cut where it suits."""
    last, n = shape[-1] if shape else 1, shape.numel()
    length = TILE if last % group == 0 else last
    return max(length, 1), -(-length // group), n


def by_rows(run: Callable[[int, int], object], layout: tuple[int, int, int]) -> None:
    length, _, n = layout
    in_parts(run, -(-n // length), values=length)


def rule_of(fmt: str, seed: int | None, dtype: torch.dtype) -> tuple[int, bool, np.float32]:
    """`how` of `encode_span`, for values of that dtype."""
    return NUMBERS[fmt], seed is not None, float32(GROUPS[fmt].most(dtype))


def quantize(x: Tensor, fmt: str, seed: int | None) -> tuple[Tensor, Tensor]:
    x, (codes, scales) = x.contiguous(), GROUPS[fmt].empty(x)
    layout, here, there = layout_of(x.shape, GROUPS[fmt].group), x.data_ptr(), (codes.data_ptr(), scales.data_ptr())
    how, keys = rule_of(fmt, seed, x.dtype), words_of(*seed_keys(seed or 0))
    bf16 = x.dtype == torch.bfloat16
    by_rows(lambda row, last: _quantize(row, last, here, bf16, layout, *there, how, keys), layout)
    return codes, scales


def dequantize(codes: Tensor, scales: Tensor, fmt: str, dtype: torch.dtype) -> Tensor:
    codes, scales = codes.contiguous(), scales.contiguous()
    out = torch.empty(codes.shape, dtype=dtype, device="cpu")
    layout, here = layout_of(codes.shape, GROUPS[fmt].group), (codes.data_ptr(), scales.data_ptr(), out.data_ptr())
    code, bf16 = NUMBERS[fmt], dtype == torch.bfloat16
    by_rows(lambda row, last: _dequantize(row, last, code, layout, *here, bf16), layout)
    return out
