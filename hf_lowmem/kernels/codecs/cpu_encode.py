"""The 8-bit codecs' encoders on a CPU, a tile at a time: whole blocks of each codec, in loops of one job each.

The formulas are those of reference.py, one function for each. A ragged last tile is filled up with zeros.
"""

import numpy as np

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
    fma,
    from_bits,
    halves_at,
    inlined,
    int32,
    left,
    look_up,
    minus,
    part,
    plus,
    put_back,
    right,
    shift_right,
    size_of,
    subtract,
    uint8,
    uint16,
    uint32,
)
from hf_lowmem.kernels.codecs import reference, tables
from hf_lowmem.kernels.codecs.blocks import NO_VALUE
from hf_lowmem.kernels.codecs.cpu_decode import EXPAND, EXPAND_BLOCK, FP32, INT8, INT8_BLOCK, SOFTSIGN, SOFTSIGN_BLOCK
from hf_lowmem.kernels.exact import BF16_MAX, FLOAT_MAX


def _bits(x: float) -> np.uint32:
    return np.float32(x).view(np.uint32)


_SMALLEST_SCALE, _SMALLEST_A, _SMALLEST_B = (
    _bits(x) for x in (reference.SMALLEST_SCALE, reference.SMALLEST_A, reference.SMALLEST_B)
)
_BF16_MAX, _FLOAT_MAX, _INF = _bits(BF16_MAX), _bits(FLOAT_MAX), _bits(float("inf"))
_SLOPE, _OFFSET, _FARTHEST = (float32(x) for x in (reference.SLOPE, reference.OFFSET, reference.FARTHEST))
_MAGIC = float32(1.5 * 2.0**23)  # a float that is added to it has no binary places left
_ORIGIN, _LOWEST = float32(tables.ORIGIN), float32(tables.LOWEST)
_POWER_OF_ONE, _NO_VALUE = tables.POWER_OF_ONE, uint32(NO_VALUE)


@inlined
def _within(bits, least, most):
    """The bits of a float that is not negative, within bounds; a nan stays one."""
    bounded = least if bits < least else bits
    bounded = most if bounded > most else bounded
    return bits if bits > _INF else bounded


@inlined
def inverse(scale):
    """1 / scale. Reference: `inverse`."""
    return (float32(1.0) / (scale * float32(2.0**-8))) * float32(2.0**-8)


@inlined
def _noise(word, signed):
    """The bits of a word that a state's encoder takes. Reference: `Dither.of_state`, the upper half."""
    return right(word, uint32(16)) if signed else both(word, uint32(0xFFFF))


@inlined
def code_at(place, noise):
    """Reference: `code_at` of dither.py."""
    return int32(both(right(plus(left(bits_of(place), uint32(2)), noise), uint32(16)), uint32(0xFF)))


@inlined
def _entry(table, row):
    """The four floats of a row."""
    at = int32(left(uint32(row), uint32(2)))
    one, two, three = add(at, int32(1)), add(at, int32(2)), add(at, int32(3))
    return look_up(table, at), look_up(table, one), look_up(table, two), look_up(table, three)


@inlined
def round_up(q, codes, places, words, signed):
    """The codes of the values below q, or the next ones, at random. Reference: dither.py.

    In a loop of its own: two gathers of which one needs the other's result cost half as much again in one.
    """
    for j in range(len(q)):
        start, slope, square, middle = _entry(places, codes[j])
        d = q[j] - middle
        codes[j] = code_at(fma(d, fma(d, square, slope), start), _noise(words[j], signed))


@inlined
def largest_and_least(x):
    """The bits of the largest |x|, and of the least that is not zero, less one; 2**31 - 1 where all are zero."""
    largest, least = uint32(0), uint32(0x7FFFFFFF)
    for j in range(len(x)):
        size = size_of(x[j])
        largest = size if size > largest else largest
        size = both(minus(size, uint32(1)), uint32(0x7FFFFFFF))
        least = size if size < least else least
    return largest, least


@inlined
def int8_scale(x, signed):
    """The block's scale. As signed integers the largest bits are the largest value's, as unsigned the least one's."""
    high, low = int32(0), uint32(0)
    for j in range(INT8_BLOCK):
        bits = bits_of(x[j])
        high = int32(bits) if int32(bits) > high else high
        low = bits if bits > low else low
    low = both(low, uint32(0x7FFFFFFF)) if low > uint32(0x7FFFFFFF) else uint32(0)
    if signed and low > uint32(high):
        return -from_bits(_within(low, _SMALLEST_SCALE, _INF))
    return from_bits(_within(uint32(high), _SMALLEST_SCALE, _INF))


@inlined
def int8_codes(x, scale, table, signed, q, codes):
    factor = inverse(scale)
    for j in range(INT8_BLOCK):
        y = x[j] * factor
        bits = bits_of(y)
        place = int32(right(bits, uint32(16)))
        code = shift_right(add(look_up(table, place), int32(both(bits, uint32(0xFFFF)))), int32(16))
        if signed and bits > uint32(0x7FFFFFFF):
            code = subtract(int32(-1), code)
        q[j] = y if y > _LOWEST else _LOWEST
        codes[j] = int32(both(uint32(code), uint32(0xFF)))


@inlined
def _softsign_place(x, slope):
    """b and y of the reference's `softsign_encode`. No table: a division is cheaper than a gather."""
    b = fma(from_bits(size_of(x)), slope, _OFFSET)
    return b, -(float32(1.0) / b) + _FARTHEST


@inlined
def softsign_nearest(x, slope, codes):
    for j in range(SOFTSIGN_BLOCK):
        _, y = _softsign_place(x[j], slope)
        near = (y + _MAGIC) - _MAGIC
        code = int32(float32(127.0) if near > float32(127.0) else near)
        codes[j] = subtract(int32(0), code) if bits_of(x[j]) > uint32(0x7FFFFFFF) else code


@inlined
def softsign_random(x, slope, words, codes):
    for j in range(SOFTSIGN_BLOCK):
        b, y = _softsign_place(x[j], slope)
        t = y - np.floor(y)
        y = fma(-b, fma(-t, t, t), y)
        y = from_bits(either(size_of(y), both(bits_of(x[j]), uint32(0x80000000))))
        codes[j] = code_at(y + _ORIGIN, _noise(words[j], True))


@inlined
def softsign_unsigned(x, scale, table, q, codes):
    factor = inverse(scale)
    for j in range(SOFTSIGN_BLOCK):
        y = x[j] * factor
        bits = bits_of(y)
        place = int32(both(right(bits, uint32(16)), uint32(0x7FFF)))
        q[j] = y
        codes[j] = shift_right(add(look_up(table, place), int32(both(bits, uint32(0xFFFF)))), int32(16))


@inlined
def largest_of(x):
    """The bits of the largest |x|."""
    largest = uint32(0)
    for j in range(len(x)):
        size = size_of(x[j])
        largest = size if size > largest else largest
    return largest


@inlined
def softsign_scales(largest, dither, scales, slopes):
    """The bf16 scale of each block, from the bits of its largest value, and what its codes need of it."""
    for b in range(len(largest)):
        bits = both(plus(_within(largest[b], _SMALLEST_SCALE, _BF16_MAX), uint32(0xFFFF)), uint32(0xFFFF0000))
        scales[b] = uint16(right(bits, uint32(16)))
        bits = largest[b] if dither and largest[b] > bits else bits
        slopes[b] = inverse(from_bits(bits)) * _SLOPE


@inlined
def powers_of(largest, least, powers, signed, scales, stored, factors):
    """The scale and the stored power of each block, from `largest_and_least`; `factors`: 1 / scale."""
    floor = int32(_POWER_OF_ONE if signed else 0)
    for b in range(len(largest)):
        a = from_bits(_within(largest[b], _SMALLEST_A, _FLOAT_MAX))
        bits = plus(_NO_VALUE if least[b] > _NO_VALUE else least[b], uint32(1))
        ratio = bits_of(inverse(from_bits(_SMALLEST_B if bits < _SMALLEST_B else bits)) * a)
        place = int32(both(right(ratio, uint32(16)), uint32(0x7FFF)))
        below = shift_right(add(look_up(powers, place), int32(both(ratio, uint32(0xFFFF)))), int32(16))
        power = subtract(int32(255), below)
        scales[b], factors[b] = a, inverse(a)
        stored[b] = uint8(floor if power < floor else power)


@inlined
def _share(x, factor, first):
    """|x| as a share of its block's largest, 1 at most, and its bits, `first` at least."""
    y = from_bits(size_of(x)) * factor
    y = y if y < float32(1.0) else float32(1.0)
    bits = int32(bits_of(y))
    return y, first if bits < first else bits


@inlined
def expand_nearest(x, factor, table, of_power, codes):
    shift, first, offset = of_power[0], of_power[1], of_power[2]
    for j in range(EXPAND_BLOCK):
        _, bits = _share(x[j], factor, first)
        codes[j] = shift_right(add(look_up(table, add(shift_right(bits, shift), offset)), bits), shift)


@inlined
def expand_random(x, factor, cells, of_power, words, signed, codes):
    shift, first, offset = of_power[0], of_power[1], of_power[2]
    for j in range(EXPAND_BLOCK):
        y, bits = _share(x[j], factor, first)
        start, slope, bend, anchor = _entry(cells, add(shift_right(bits, shift), offset))
        d = y - anchor
        place = fma(d if d < float32(0.0) else float32(0.0), bend, fma(d, slope, start))
        place = bits_of(place)
        if not signed:
            place = place if bits_of(x[j]) > uint32(0) else uint32(0)
        codes[j] = int32(both(right(plus(place, _noise(words[j], signed)), uint32(16)), uint32(0xFF)))


@inlined
def floor_codes(x, codes):
    """No value that is not zero gets code 0. Reference: `mark_nonzero`, for which a negative one is zero."""
    for j in range(TILE):
        least = int32(1) if x[j] > float32(0.0) else int32(0)
        codes[j] = least if codes[j] < least else codes[j]


@inlined
def floor_sizes(x, codes):
    for j in range(TILE):
        least = int32(1) if size_of(x[j]) > uint32(0) else int32(0)
        codes[j] = least if codes[j] < least else codes[j]


@inlined
def sign_codes(x, codes):
    for j in range(TILE):
        codes[j] = int32(either(uint32(codes[j]), both(right(bits_of(x[j]), uint32(24)), uint32(0x80))))


@inlined
def narrow(codes, out, count):
    for j in range(count):
        out[j] = uint8(codes[j])


@inlined
def make_room():
    """Scratch memory for `encode_tile`: scaled values, codes; of each block the largest, the least, a factor."""
    blocks = TILE // min(INT8_BLOCK, SOFTSIGN_BLOCK, EXPAND_BLOCK)
    of_blocks = np.empty(blocks, uint32), np.empty(blocks, uint32), np.empty(blocks, float32)
    return np.empty(TILE, float32), np.empty(TILE, int32), *of_blocks


@inlined
def _parts(x, q, codes, words, b, block):
    start = b * block
    return part(x, start, block), part(q, start, block), part(codes, start, block), part(words, start, block)


@inlined
def _int8_tile(x, words, how, address, start, blocks, tables, room):
    _, table, places, _, _ = tables
    _, signed, dither = how
    scales = floats_at(address[1] + 4 * (start // INT8_BLOCK), blocks)
    for b in range(blocks):
        here, q, codes, words_here = _parts(x, room[0], room[1], words, b, INT8_BLOCK)
        scales[b] = int8_scale(here, signed)
        int8_codes(here, scales[b], table, signed, q, codes)
        if dither:
            round_up(q, codes, places, words_here, signed)


@inlined
def _softsign_tile(x, words, how, address, start, blocks, tables, room):
    """Encode blocks: scales first, then codes, so that what each waits for is computed for all at once."""
    _, table, places, _, _ = tables
    _, signed, dither = how
    first = start // SOFTSIGN_BLOCK
    largest, slopes = part(room[2], 0, blocks), part(room[4], 0, blocks)
    for b in range(blocks):
        largest[b] = largest_of(part(x, b * SOFTSIGN_BLOCK, SOFTSIGN_BLOCK))
    if signed:
        softsign_scales(largest, dither, halves_at(address[1] + 2 * first, blocks), slopes)
    for b in range(blocks):
        here, q, codes, words_here = _parts(x, room[0], room[1], words, b, SOFTSIGN_BLOCK)
        if signed and dither:
            softsign_random(here, slopes[b], words_here, codes)
        elif signed:
            softsign_nearest(here, slopes[b], codes)
        else:
            scale = from_bits(_within(largest[b], _SMALLEST_SCALE, _FLOAT_MAX))
            floats_at(address[1] + 4 * (first + b), 1)[0] = scale
            softsign_unsigned(here, scale, table, q, codes)
            if dither:
                round_up(q, codes, places, words_here, False)


@inlined
def _expand_tile(x, words, how, address, start, blocks, tables, room):
    """Encode blocks in that order, too."""
    _, table, places, powers, rows = tables
    _, signed, dither = how
    first = start // EXPAND_BLOCK
    scales, stored = floats_at(address[1] + 4 * first, blocks), bytes_at(address[2] + first, blocks)
    largest, least, factors = part(room[2], 0, blocks), part(room[3], 0, blocks), part(room[4], 0, blocks)
    for b in range(blocks):
        largest[b], least[b] = largest_and_least(part(x, b * EXPAND_BLOCK, EXPAND_BLOCK))
    powers_of(largest, least, powers, signed, scales, stored, factors)
    for b in range(blocks):
        here, _, codes, words_here = _parts(x, room[0], room[1], words, b, EXPAND_BLOCK)
        power = int(stored[b])
        if dither:
            expand_random(here, factors[b], places, rows[power], words_here, signed, codes)
        else:
            expand_nearest(here, factors[b], table, rows[power], codes)


@called
def encode_tile(x, words, how, address, start, count, tables, room):
    """Write the codes and scalars of a tile, the values from `start` on, of which `count` are there; the rest is zero.

    What a step of the recommended pair does is written out, so that its loops are compiled for it alone.

    Args:
        words: random bits, where they are rounded at random.
        how: the codec's number; whether the state is signed; whether it is rounded at random.
        address: of the state's tensors: codes, scale, power.
        tables: from `tables_of`.
        room: from `make_room`.
    """
    codec, signed, dither = how
    if codec == FP32:
        put_back(x, address[0], start, count)
        return
    codes = room[1]
    if codec == INT8:
        _int8_tile(x, words, how, address, start, (count + INT8_BLOCK - 1) // INT8_BLOCK, tables, room)
    elif codec == SOFTSIGN:
        blocks = (count + SOFTSIGN_BLOCK - 1) // SOFTSIGN_BLOCK
        if signed and dither:
            _softsign_tile(x, words, (codec, True, True), address, start, blocks, tables, room)
        else:
            _softsign_tile(x, words, how, address, start, blocks, tables, room)
    else:
        blocks = (count + EXPAND_BLOCK - 1) // EXPAND_BLOCK
        if not signed and dither:
            _expand_tile(x, words, (codec, False, True), address, start, blocks, tables, room)
        else:
            _expand_tile(x, words, how, address, start, blocks, tables, room)
    if codec == EXPAND:
        if not dither:
            floor_sizes(x, codes)
        if signed:
            sign_codes(x, codes)
    elif not signed:
        floor_codes(x, codes)
    narrow(codes, bytes_at(address[0] + start, count), count)
