"""The tables of the 8-bit codecs: the value of each code, and the code of each value.

A code is found by *thresholds*: code j is taken from the j-th threshold on. That defines a codec without naming a
logarithm or a root, whose last bits differ from device to device; the thresholds are computed once, in fp64 on the
CPU, and copied, so every device gives the same codes.

Finding a place among hundreds of thresholds takes one look-up and one addition. The upper bits of an fp32 name an
interval that is narrower than any gap between two thresholds, so at most one lies inside, and the lower bits decide on
which side of it x is. An entry packs both facts, `code << shift | (2**shift - first lower bits beyond the threshold)`:
adding the lower bits carries into the code exactly when x is beyond. (torch.bucketize searches 8 levels: 20 times
slower.)

There are two sets of thresholds: between the values, to round to the nearest, and the values themselves, to find the
one below. `places` is what rounding at random from there needs: see `round_up` of dither.py.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from hf_lowmem.kernels.exact import E4M3_MAX

E4M3_MIN = 2.0**-9  # the smallest subnormal

DECADES = 7  # of the dynamic map

ORIGIN = 768  # a float from 512 to 1024 has 14 binary places, and the 8 bits above them are a code
CELL_ORIGIN = 128  # a float from 128 to 256 has 16, and where codes are 7 bits, the byte above them is one

SOFTNESS = 0.15  # c of the softsign
STEPS = {True: 127, False: 255}  # its codes from 0 to 1, for signed and unsigned states

POWERS_PER_OCTAVE = 60
POWER_OF_ONE = 105  # the stored power that means k = 1
SIGNED_BINADES = math.log2(E4M3_MAX / E4M3_MIN)  # 17.8, subnormals included
UNSIGNED_BINADES = math.log2(E4M3_MAX / 2.0**-6)  # 14.8, normal codes alone
LARGEST_CODE = 0x7E  # 448
# |x| / a is at most 1 + 2**-8; anything above, a nan too, counts as this.
LARGEST_BITS = 0x3F80FFFF


class DeviceTable:
    """A constant that `build` makes on the CPU, copied to each device that asks for it, once.

    A plain dict, because torch.compile reads tensors out of one but ignores functools.cache. Building cannot be
    traced: a codec asks for its tables in `init`, so compiled code finds them there.
    """

    def __init__(self, build: Callable[[], Tensor]):
        self.build = build
        self.built: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """Raises RuntimeError if compiled code is the first to ask."""
        if device not in self.built:
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    f"a codec's table for {device} is first needed inside torch.compile, which cannot build it: "
                    "call the codec's init(), or encode or decode once, on that device before compiling"
                )
            with torch.inference_mode(False), torch.device("cpu"):
                self.built[device] = self.build().to(device)
        return self.built[device]


def packed(thresholds: Tensor, first: int, shift: int, count: int) -> Tensor:
    """The table described above, int32 (count,): entry i is for the bits from first + (i << shift) on.

    `thresholds`: int64, ascending; the bits of the first fp32 that takes code 1, 2, ...
    """
    start = first + (torch.arange(count) << shift)
    code = torch.searchsorted(thresholds, start, right=True)
    until = thresholds[code.clamp(max=thresholds.numel() - 1)] - start  # how far inside the interval the code rises
    inside = (until > 0) & (until < 1 << shift)
    return ((code << shift) + torch.where(inside, (1 << shift) - until, 0)).int()


def bits_of(x: Tensor) -> Tensor:
    """The bits of fp64 values rounded to fp32, int64."""
    return x.float().view(torch.int32).long()


def dynamic_map(signed: bool) -> Tensor:
    """The 256 values of the dynamic map, ascending, fp32 (256,).

    Decade i = 0 .. 6 spans [10**(i-7), 10**(i-6)] and is cut into 2**i equal parts (2**(i+1) if unsigned),
    of which the middles are taken, with both signs if signed. With 0 and 1 these are 2 * 127 + 2 = 256 (254
    + 2 if unsigned).
    """
    values = [0.0, 1.0]
    for i in range(DECADES):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, dtype=torch.float32)
        middles = (10.0 ** (i - DECADES + 1) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += middles
        if signed:
            values += [-middle for middle in middles]
    return torch.tensor(sorted(values), dtype=torch.float32)


def places(values: Tensor, signed: bool) -> Tensor:
    """The polynomial of the gap above each of `values` (fp32, ascending along the last axis): fp32 (their number, 4).

    A value q of the gap above code j belongs at ORIGIN + j + p, where p is the probability of the next code:

    ```python
    d = q - middle
    place = d * (d * square + slope) + start                         # start = ORIGIN + j + 1/2
    ```
    Of a signed state p rises evenly; of an unsigned one as log(q), whose polynomial is exact at both ends and where
    p = 1/2, and nowhere falls. No value is above the last one, and what is above a zero of an unsigned state has a
    code of its own: they are constants.

    Returns:
        start, slope, square, middle.
    """
    low, high = values[..., :-1].double(), values[..., 1:].double()
    code = torch.arange(values.shape[-1], dtype=torch.float64) + ORIGIN
    middle = ((low + high) / 2 if signed else (low * high).sqrt()).float().double()
    below, above = middle - low, high - middle
    rise, fall = 0.5 / below, 0.5 / above  # slopes of the two chords
    square = (fall - rise) / (high - low)
    slope = rise + square * below
    start = code[:-1] + 0.5
    # Where the parabola would turn before its end, the one that turns there: 1 - (1 - t)**2.
    turns = slope + 2 * square * above < 0
    part = below / (high - low)
    start = torch.where(turns, code[:-1] + part * (2 - part), start)
    slope = torch.where(turns, 2 * (1 - part) / (high - low), slope)
    square = torch.where(turns, -1 / (high - low) ** 2, square)
    if not signed:
        flat = low == 0
        start = torch.where(flat, code[:-1], start)
        slope, square, middle = (x.masked_fill(flat, 0.0) for x in (slope, square, middle))
    rows = torch.stack((start.expand_as(low), slope, square, middle), -1)
    last = torch.zeros(*rows.shape[:-2], 1, 4, dtype=torch.float64)
    last[..., 0] = code[-1]
    return torch.cat((rows, last), -2).float().view(-1, 4)


def dynamic_table(signed: bool, nearest: bool) -> Tensor:
    """Finds a value of the dynamic map: int32 (65536,), indexed by the upper half of an fp32's bits.

    For negative x the bits grow as x falls, so those entries hold `255 - code`, and the caller complements the result.
    Of the nearest, a quotient halfway between two values takes the lower one.
    """
    values = dynamic_map(signed)
    if nearest:
        middles = (values[:-1].double() + values[1:].double()) / 2  # exact: two fp32 of similar size
        beyond = middles.float()  # the first fp32 above each midpoint
        above = torch.nextafter(beyond, torch.full_like(beyond, torch.inf))
        beyond = torch.where(beyond.double() > middles, beyond, above)
    else:
        beyond = values[1:]
    bits = beyond.view(torch.int32).long()
    order = torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))  # integers in the order of the floats
    positive = packed(order, 0, 16, 1 << 15)

    magnitude = torch.arange(1 << 15) << 16
    down = torch.searchsorted(order, -magnitude, right=True)
    until = 1 - order[(down - 1).clamp(min=0)] - magnitude  # the code falls once -magnitude < order
    inside = (down > 0) & (until > 0) & (until < 1 << 16)
    negative = ((255 - down) << 16) + torch.where(inside, (1 << 16) - until, 0)
    return torch.cat([positive, negative.int()])


LOWEST = dynamic_map(True)[0].item()  # -0.993: nearer to zero than the highest value, 1
MAPS = {signed: DeviceTable(functools.partial(dynamic_map, signed)) for signed in (True, False)}
DYNAMIC_CODES = {
    (signed, nearest): DeviceTable(functools.partial(dynamic_table, signed, nearest))
    for signed in (True, False)
    for nearest in (True, False)
}
DYNAMIC_PLACES = {
    signed: DeviceTable(functools.partial(lambda signed: places(dynamic_map(signed), signed), signed))
    for signed in (True, False)
}


def softsign_inverse(y: Tensor) -> Tensor:
    """The inverse of the companding, for |y| <= 1."""
    return SOFTNESS * y / (1 + SOFTNESS - y.abs())


def softsign_values(signed: bool) -> Tensor:
    """x / scale of every code, fp32 (256,). Signed codes are int8 in a byte; 0x80, -128, is never written."""
    codes = torch.arange(256, dtype=torch.uint8)
    if signed:
        return softsign_inverse(codes.view(torch.int8).double() / STEPS[True]).float()
    return softsign_inverse(codes.double() / STEPS[False]).square().float()


def softsign_table(nearest: bool) -> Tensor:
    """Finds the code of an unsigned x / scale: int32 (32768,), indexed by the upper half of an fp32's bits.

    The threshold of code j is where 255 steps of the companded root reach j - 1/2, or j. Two are 2.7 % apart at least.
    """
    reached = (torch.arange(1, 256, dtype=torch.float64) - (0.5 if nearest else 0.0)) / STEPS[False]
    return packed(bits_of(softsign_inverse(reached).square()), 0, 16, 1 << 15)


SOFTSIGN_VALUES = {signed: DeviceTable(functools.partial(softsign_values, signed)) for signed in (True, False)}
SOFTSIGN_CODES = {nearest: DeviceTable(functools.partial(softsign_table, nearest)) for nearest in (True, False)}
SOFTSIGN_PLACES = DeviceTable(lambda: places(softsign_values(False), False))


def e4m3_values() -> Tensor:
    """The value of every E4M3 code, fp32 (256,); codes 0x7F and 0xFF are nan and never written for finite input.

    A look-up in it is twice as fast as torch's own cast from float8 on a CPU.
    """
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def exponents() -> Tensor:
    """k of every stored power, fp64 (256,)."""
    return 2.0 ** ((torch.arange(256, dtype=torch.float64) - POWER_OF_ONE) / POWERS_PER_OCTAVE)


def expanded_values() -> Tensor:
    """sign(q) (|q|/448)^(1/k) for every power and code, fp32 (256 * 256,), row by power: 256 KiB.

    A look-up instead of a power: exact to fp32's rounding, equal on every device, and half the time on a CPU.
    """
    q = e4m3_values().double()  # (256,)
    return ((q.abs() / E4M3_MAX) ** (1 / exponents()[:, None])).copysign(q).float().view(-1)


def expanding_thresholds(nearest: bool) -> Tensor:
    """Bounds of |x| / a for each code, (middle of two codes / 448)^(1/k), or its value: int64 bits, (256, 126)."""
    values = e4m3_values()[: LARGEST_CODE + 1].double()
    reached = (values[1:] + values[:-1]) / 2 if nearest else values[1:]
    return bits_of((reached / E4M3_MAX) ** (1 / exponents()[:, None]))


def expanding_rows(nearest: bool) -> Tensor:
    """Rows that locate |x| / a in `expanding_table`, or `expanding_cells`, int32 (256, 3), one a power: shift, first
    bits, offset.

    ```python
    bits = clamp(bits(abs(x) / a), first, LARGEST_BITS)
    code = (table[(bits >> shift) + offset] + bits) >> shift
    ```
    The narrowest interval that the widest gap allows would be the same number of bits for all powers; with as many as
    each needs, the row of a power is 250 to 600 entries, of cells twice as many, and a group, which has one power,
    stays in few KiB of the table. The first bits are those of the interval before the first threshold.
    """
    thresholds = expanding_thresholds(nearest)
    # At the end of a binade, 14.5 to 15.5: the narrowest gap in proportion, 6.9 % / k.
    gap = thresholds.diff(dim=1).amin(1)
    shift = gap.double().log2().floor().long() - (0 if nearest else 1)  # two cells a gap: see `expanding_cells`
    first = ((thresholds[:, 0] - 1) >> shift << shift) if nearest else ((thresholds[:, 0] >> shift) - 1) << shift
    count = ((LARGEST_BITS - first) >> shift) + 1
    offset = count.cumsum(0) - count - (first >> shift)
    return torch.stack([shift, first, offset], 1).int()


def expanding_table() -> Tensor:
    """The rows of all powers one after another, int32 (about 110 000,), to round to the nearest.

    The upper bits, which tell the place, are taken off each entry: the whole bits can be added, not the lower ones.
    """
    thresholds = expanding_thresholds(nearest=True)
    rows = []
    for power, (shift, first, _) in enumerate(expanding_rows(nearest=True).tolist()):
        count = ((LARGEST_BITS - first) >> shift) + 1
        rows.append(packed(thresholds[power], first, shift, count) - (first + (torch.arange(count) << shift)))
    return torch.cat(rows).int()


def expanding_cells(signed: bool) -> Tensor:
    """The place among the codes of each |x| / a, to round at random: fp32 (about 220 000, 4), rows as above.

    ```python
    start, slope, bend, anchor = cells[(bits >> shift) + offset]
    d = abs(x) / a - anchor
    place = min(d, 0) * bend + (d * slope + start)                   # start = CELL_ORIGIN + j + ...
    ```
    A cell is at most half as wide as a gap between two codes, so it holds the value of one at most. That is then its
    anchor, and slopes differ on both sides. Between codes a signed state's place is linear, which this is exactly; an
    unsigned one's is a logarithm, of which a cell has the chord, and on each side of an anchor the chord of the nearer
    half: off by less than a quarter of the square of a cell's width.

    A second moment that moves little sees the slopes beside its own code alone. With chords of whole gaps it would
    rise by 1 or 2 % less than it should, fall by as much more, and so stay too small: at beta2 = 0.999 the update would
    be too large by 0.7 %. Halves of half as wide a cell leave 0.05 %.

    What is below the value of code 1 is in the first cell, whatever its size, unclamped: of a signed state it lies
    between codes 0 and 1, of an unsigned one it counts as 1; its zeros are seen to elsewhere.
    """
    thresholds = expanding_thresholds(nearest=False)
    cells = []
    for power, (shift, first, _) in enumerate(expanding_rows(nearest=False).tolist()):
        at = thresholds[power].int().view(torch.float32).double()
        count = ((LARGEST_BITS - first) >> shift) + 1
        edges = (first + (torch.arange(count + 1) << shift)).int()
        low, high = edges[:-1], edges[1:]
        code = torch.searchsorted(thresholds[power], high.long(), right=False)  # whose value is the last below `high`
        anchor = at[(code - 1).clamp(min=0)]
        low, high = (x.view(torch.float32).double() for x in (low, high))
        inside = anchor >= low
        anchor = torch.where(inside, anchor, low)
        right = torch.where(inside, (anchor + high) / 2, high)
        left = (anchor + low) / 2
        of_anchor, of_left, of_right = (_place(x, at, signed) for x in (anchor, left, right))
        slope = (of_right - of_anchor) / (right - anchor)
        before = (of_anchor - of_left) / (anchor - left)
        bend = torch.where(anchor > low, before - slope, 0.0)
        cells.append(torch.stack((of_anchor + CELL_ORIGIN, slope, bend, anchor), 1))
        rest = (0.0, 1 / at[0].item(), 0.0, 0.0) if signed else (1.0, 0.0, 0.0, 0.0)
        cells[-1][0] = torch.tensor(rest, dtype=torch.float64)
        cells[-1][0, 0] += CELL_ORIGIN
        if not signed:
            cells[-1][1, 0] += 2.0**-16  # however its sums are rounded, no place is below that of code 1
    return torch.cat(cells).float()


def _place(q: Tensor, at: Tensor, signed: bool) -> Tensor:
    """The place among the codes of quotients, fp64; `at`: the values of codes 1, 2, ..."""
    code = torch.searchsorted(at, q, right=True)
    low, high = at[(code - 1).clamp(min=0)], at[code.clamp(max=len(at) - 1)]
    part = (q - low) / (high - low) if signed else (q / low).log() / (high / low).log()
    below = q / at[0] if signed else torch.ones_like(q)
    return torch.where(code == 0, below, code + torch.where(code < len(at), part, 0.0))


def power_thresholds(signed: bool) -> Tensor:
    """Bounds of a / b for the powers 255, 254, ... 1 from above, fp32 (255,), ascending; 2.1 % apart at least.

    Power p stands for the k = 2**((p - 105) / 60) that is nearest to binades / log2(a / b), so it is taken up to the
    ratio whose k is half a step below.
    """
    step = torch.arange(255, 0, -1, dtype=torch.float64) - 0.5
    k = 2.0 ** ((step - POWER_OF_ONE) / POWERS_PER_OCTAVE)
    return (2.0 ** ((SIGNED_BINADES if signed else UNSIGNED_BINADES) / k)).float()


def power_table(signed: bool) -> Tensor:
    """Finds how many of the thresholds are below a / b: int32 (32768,), indexed by the upper half of its bits."""
    return packed(bits_of(power_thresholds(signed)) + 1, 0, 16, 1 << 15)


EXPANDED_VALUES = DeviceTable(expanded_values)
EXPANDING_ROWS = {nearest: DeviceTable(functools.partial(expanding_rows, nearest)) for nearest in (True, False)}
EXPANDING_TABLE = DeviceTable(expanding_table)
EXPANDING_CELLS = {signed: DeviceTable(functools.partial(expanding_cells, signed)) for signed in (True, False)}
POWERS = {signed: DeviceTable(functools.partial(power_table, signed)) for signed in (True, False)}
