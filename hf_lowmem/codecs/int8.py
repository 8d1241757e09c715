"""Blockwise 8-bit states with the dynamic map (Dettmers et al., arXiv 2110.02861, section 2 and appendix).

A block of 256 values is divided by its extreme and each quotient is replaced by the nearest of 256 fixed
numbers in [-1, 1] (or [0, 1]). The map is a float with a *dynamic* exponent: seven decades from 1 down to
1e-7, each with half as many fractions as the decade above, so large values are exact to 0.7 % and small
ones still have an order of magnitude. A linear map would spend its codes evenly and lose everything under
1/255 of the extreme.

Two departures from the authors' code:
- **The scale has a sign.** The signed map holds +1 but not -1 (256 is even), so a block whose extreme is
  negative would store it as -0.993, and every step would shrink it again by 0.7 %. Here the scale is the
  extreme *with its sign*: the extreme always becomes +1 and is exact. It costs nothing, as an fp32 has the
  bit anyway.
- **The second moment has a floor.** A positive value that would round to 0 takes the smallest positive code;
  a v of exactly 0 beside an m that is not makes Adam step by m / eps.
"""

import functools
from typing import ClassVar

import torch
from torch import Tensor

from hf_lowmem.codecs.blocks import BlockCodec, DeviceTable, ErrorBound, mark_nonzero

DECADES = 7


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


def nearest_table(signed: bool) -> Tensor:
    """A table that finds the nearest value of the dynamic map by one look-up and one addition, exactly.

    The upper 16 bits of an fp32 name an interval 1/128 wide, relative to its position. That is narrower
    than any gap between two midpoints of the map, so at most one midpoint lies inside, and the lower 16
    bits decide on which side of it x lies. An entry packs both facts: `code << 16 | (65536 - first lower
    half beyond the midpoint)`; adding the lower half carries into the code exactly when x is beyond. For
    negative x the bits grow as x falls, so those entries hold `255 - code`, and the caller complements the
    result. (torch.bucketize searches 8 levels: 20 times slower.)

    A quotient halfway between two values takes the lower one. Returns int32 (65536,), indexed by the upper
    half.
    """
    wide = dynamic_map(signed).double()
    middles = (wide[:-1] + wide[1:]) / 2  # exact: two fp32 of similar size
    beyond = middles.float()  # the first fp32 above each midpoint
    beyond = torch.where(beyond.double() > middles, beyond, torch.nextafter(beyond, torch.full_like(beyond, torch.inf)))
    bits = beyond.view(torch.int32).long()
    order = torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))  # integers in the order of the floats

    magnitude = torch.arange(1 << 15) << 16  # the first bit pattern of each interval
    up = torch.searchsorted(order, magnitude, right=True)
    until = order[up.clamp(max=254)] - magnitude  # how far inside the interval the code rises
    positive = (up << 16) + torch.where((until > 0) & (until < 1 << 16), (1 << 16) - until, 0)

    down = torch.searchsorted(order, -magnitude, right=True)
    until = 1 - order[(down - 1).clamp(min=0)] - magnitude  # the code falls once -magnitude < order
    inside = (down > 0) & (until > 0) & (until < 1 << 16)
    negative = ((255 - down) << 16) + torch.where(inside, (1 << 16) - until, 0)
    return torch.cat([positive, negative]).int()


MAPS = {signed: DeviceTable(functools.partial(dynamic_map, signed)) for signed in (True, False)}
TABLES = {signed: DeviceTable(functools.partial(nearest_table, signed)) for signed in (True, False)}


class Int8Codec(BlockCodec):
    """`int8`: 1 + 4/256 = 1.016 bytes a value. `codes` and the signed extreme of each block of 256, fp32.

    ```python
    scale = x[argmax(abs(x))]                                  # per block
    codes = argmin(abs(x / scale - map))                       # to the nearest
    codes = where((x != 0) & ~signed, maximum(codes, 1), codes)
    x = map[codes] * scale
    ```
    Error: in the top decade the map's gaps are 0.9/64 (unsigned 0.9/128), and half a gap is 7.03 % (3.52 %)
    of the smallest value there; under it half a gap is at most 0.45/32 (0.45/64) of a tenth of the extreme,
    and shrinks fivefold a decade. The gap across 0.1 (0.0986 to 0.1070) is inside both. The floor code
    stands for 3.25e-7.

    Good for a first moment; for a second one see `fp8_expand`: here a v under 1e-6 of its block's largest keeps
    no digit and is raised to the floor, so 1/sqrt(v) is finite but may be a hundredfold too small.
    """

    name: ClassVar[str] = "int8"
    block: ClassVar[int] = 256
    scalars: ClassVar[dict[str, torch.dtype]] = {"scale": torch.float32}
    # The smallest code (3.25e-7) times this is still a normal fp32, so no device flushes it to zero.
    smallest: ClassVar[float] = 2.0**-104
    signed_bound: ClassVar[ErrorBound] = ErrorBound(relative=4.5 / 64, absolute=0.045 / 32)
    unsigned_bound: ClassVar[ErrorBound] = ErrorBound(relative=4.5 / 128, absolute=0.045 / 64)

    def zero_code(self, signed: bool) -> int:
        return 127 if signed else 0

    def tables(self, signed: bool) -> tuple[DeviceTable, ...]:
        return MAPS[signed], TABLES[signed]

    def encode_rows(self, x: Tensor, signed: bool) -> tuple[Tensor, ...]:
        high = x.amax(1)
        if signed:
            low = x.amin(1).neg_()
            scale = torch.where(high >= low, high.clamp(min=self.smallest), low.clamp(min=self.smallest).neg_())
        else:
            scale = high.clamp(min=self.smallest)
        table = TABLES[signed].on(x.device)
        bits = x.div(scale[:, None]).view(torch.int32).view(-1)
        found = table.index_select(0, bits.bitwise_right_shift(16).bitwise_and_(0xFFFF))
        found.add_(bits.bitwise_and(0xFFFF)).bitwise_right_shift_(16)
        if signed:
            codes = found.bitwise_xor_(bits.bitwise_right_shift_(31)).to(torch.uint8).view_as(x)
        else:
            codes = found.to(torch.uint8).view_as(x)
            codes = torch.maximum(codes, mark_nonzero(x))
        return codes, scale

    def decode_rows(self, codes: Tensor, scalars: tuple[Tensor, ...], signed: bool) -> Tensor:
        values = MAPS[signed].on(codes.device)
        return values.index_select(0, codes.view(-1).int()).view(codes.shape).mul_(scalars[0][:, None])
