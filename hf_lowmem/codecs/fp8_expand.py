"""E4M3 after dynamic range expansion: the codec for a second moment (COAT, arXiv 2410.19313, section 4).

A group of 128 spans a range of its own, E4M3 has a fixed one. Raising |x|/a to a power k fits the one to the
other, and the relative error of a decoded value is that of E4M3 divided by k. `int8` and `fp8` cannot adapt: in a
wide group their small values fall to the floor, in a narrow one most of their codes are never used.

COAT centres the group, x -> (|x|/c)^k / s, and stores s, k, c as three fp32 (12 bytes a group). c and s cancel:
with a the largest |x|, (|x|/c)^k / s = 448 (|x|/a)^k. So two scalars are enough, and here they take 3 bytes:

- a as bf16, rounded *before* it is used, so that the rounding is no error of its own: values above the rounded a
  (by at most 2**-8) saturate, and one below it still reaches the code 448: (1 + 2**-8)**-5.66 * 448 = 438 > 432;
- k as one uint8, `2 ** ((power - 105) / 60)`, from 0.297 to 5.66, the nearest step.

Where this departs from COAT, and why:

- COAT floors k to a multiple of 1/16, here the steps have equal *ratio* (1.2 %) and k is rounded to the nearest.
  The smallest value then always lands on its intended code: k is off by at most 0.58 %, which moves it by at most
  2**(14.8 * 0.0058) = 6.1 %, and the next rounding boundary is at +-6.25 %. The decoded group therefore has the
  same a, the same b and the same k, and encoding it again changes nothing. With floored multiples of 1/16 it has
  not when k < 1.9, and a state that is merely carried along drifts.
- A second moment fits into the *normal* codes, 448 down to 2**-6. The seven subnormal codes would add three
  binades to the range, with errors of up to a third in exactly those values whose 1/sqrt is the largest.
- A second moment may be compressed (k < 1), when its group is wider than E4M3. With k >= 1 the small values would
  fall to the floor instead, up to a hundredfold off, as `fp8` shows. A first moment is never compressed and uses the
  subnormal codes: its small values only add, so its large ones should have the precision.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor

from hf_lowmem.codecs.blocks import (
    BF16_MAX,
    BlockCodec,
    DeviceTable,
    ErrorBound,
    mark_nonzero,
    round_to_bf16,
    smallest_nonzero,
)
from hf_lowmem.codecs.fp8 import E4M3_MAX, E4M3_MIN, e4m3_values, to_e4m3

POWERS_PER_OCTAVE = 60
POWER_OF_ONE = 105  # the stored power that means k = 1
SIGNED_BINADES = math.log2(E4M3_MAX / E4M3_MIN)  # 17.8, subnormals included
UNSIGNED_BINADES = math.log2(E4M3_MAX / 2.0**-6)  # 14.8, normal codes alone
# The least a: 2**-108 / 2**17.8 is a normal fp32. The least b: three binades of subnormal codes under it, at the
# smallest k, end at 2**-116 / 2**(3 / 0.297) = 2**-126, so whatever is decoded is normal too.
SMALLEST_A = 2.0**-108
SMALLEST_B = 2.0**-116


def exponent(power: Tensor) -> Tensor:
    """k of each group, fp32, from its stored uint8."""
    return power.float().sub_(POWER_OF_ONE).div_(POWERS_PER_OCTAVE).exp2_()


def expanded_values() -> Tensor:
    """sign(q) (|q|/448)^(1/k) for every power and code, fp32 (256 * 256,), row by power: 256 KiB.

    A look-up instead of a power: exact to fp32's rounding, equal on every device, and half the time on a CPU.
    """
    q = e4m3_values().double()  # (256,)
    power = torch.arange(256, dtype=torch.float64)[:, None]
    k = 2.0 ** ((power - POWER_OF_ONE) / POWERS_PER_OCTAVE)
    return ((q.abs() / E4M3_MAX) ** (1 / k)).copysign(q).float().view(-1)


EXPANDED_TABLE = DeviceTable(expanded_values)


class Fp8ExpandCodec(BlockCodec):
    """`fp8_expand`: 1 + 3/128 = 1.023 bytes a value (COAT: 1.094). E4M3 `codes`, a (bf16), `power` (uint8).

    ```python
    a = bf16(max(abs(x)))                                        # per group of 128
    b = min(abs(x[x != 0]))
    k = clamp(log(448 / 2**-9) / log(a / b), 1, 5.66)            # signed
    k = clamp(log(448 / 2**-6) / log(a / b), 0.297, 5.66)        # unsigned; to the nearest power of 2**(1/60)
    codes = E4M3(sign(x) * min((abs(x) / a)**k * 448, 448))
    codes = where(x != 0, sign(x) * maximum(abs(codes), 1), 0)   # floor code, both signs
    x = sign(codes) * (abs(codes) / 448)**(1 / k) * a
    ```
    Error: in the expanded domain that of E4M3. A normal code is at most 1/15 = 6.7 % above what it stands for (7.5
    units rounded up to the lowest, 8) and 1/17 below (17 rounded down to 16), the decoded value the k-th root of
    that: about 6.7 % / k. This holds for every value of an unsigned group up to a / b = 1e15; in a wider one the
    floor raises the rest. A signed group's values with subnormal codes are coarser: rounding 1.5 to 1 or to 2 is
    the worst and moves a value by a third at k = 1.

    The floor holds for signed states too. A zero instead would be nearer by half a step, 2e-6 of the group's
    largest, but would change the group's smallest non-zero value and so its k at the next encoding. The price: where
    a group holds rows of very different size, and v is small with m, a first moment that is raised to 4e-6 of its
    group's largest makes the update explode: on the embedding of a fine-tuned SmolLM2 the worst error is
    66 learning rates. For such a state, and as a rule for a first moment, take `int8_softsign`.

    For a first moment neither it nor `int8` is always the better one: the relative Frobenius error is 0.013
    against 0.011 on gaussian data and 0.010 against 0.014 on log-normal (sigma 1).
    """

    name: ClassVar[str] = "fp8_expand"
    block: ClassVar[int] = 128
    scalars: ClassVar[dict[str, torch.dtype]] = {"scale": torch.bfloat16, "power": torch.uint8}
    # SMALLEST_B as a part of the largest value of a group that is just wide enough for the smallest k.
    smallest: ClassVar[float] = 2.0**-66
    # 2**-12: what the fp32 power adds near a tie, 2**-18 of q, with room.
    signed_bound: ClassVar[ErrorBound] = ErrorBound(1 / 3 + 2.0**-12, E4M3_MIN / E4M3_MAX)
    unsigned_bound: ClassVar[ErrorBound] = ErrorBound((16 / 15) ** (1 / 0.297) - 1 + 2.0**-12, 2.0**-49)

    def tables(self, signed: bool) -> tuple[DeviceTable, ...]:
        return (EXPANDED_TABLE,)

    def encode_rows(self, x: Tensor, signed: bool) -> tuple[Tensor, ...]:
        magnitude = x.abs() if signed else x
        a = round_to_bf16(magnitude.amax(1).clamp_(SMALLEST_A, BF16_MAX))
        b = smallest_nonzero(magnitude).clamp_(min=SMALLEST_B)
        # A ratio below 1.01 (all values equal, or none) has a logarithm of zero or less; its k is clamped anyway.
        binades = a.div(b).clamp_(min=1.01).log2_()
        k = (SIGNED_BINADES if signed else UNSIGNED_BINADES) / binades
        step = k.log2_().mul_(POWERS_PER_OCTAVE).add_(POWER_OF_ONE).round_()
        power = step.clamp_(POWER_OF_ONE if signed else 0, 255).to(torch.uint8)
        # Power by logarithms: faster than pow on a CPU. The clamp spares log2 its slow path for zero.
        q = magnitude.div(a[:, None]).clamp_(min=2.0**-100).log2_()
        q = q.mul_(exponent(power)[:, None]).exp2_().mul_(E4M3_MAX).clamp_(max=E4M3_MAX)
        codes = torch.maximum(to_e4m3(q), mark_nonzero(magnitude))
        if signed:
            codes.bitwise_or_(x.view(torch.int32).bitwise_right_shift(24).bitwise_and_(0x80).to(torch.uint8))
        return codes, a, power

    def decode_rows(self, codes: Tensor, scalars: tuple[Tensor, ...], signed: bool) -> Tensor:
        a, power = scalars
        where = codes.int().add_(power.int().mul_(256)[:, None]).view(-1)
        table = EXPANDED_TABLE.on(codes.device)
        return table.index_select(0, where).view(codes.shape).mul_(a.float()[:, None])
