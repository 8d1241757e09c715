"""E4M3 after dynamic range expansion: the codec for a second moment (COAT, arXiv 2410.19313, section 4).

A group of 128 spans a range of its own, E4M3 has a fixed one. Raising |x|/a to a power k fits the one to the
other, and the relative error of a decoded value is that of E4M3 divided by k. `int8` and `fp8` cannot adapt: in a
wide group their small values fall to the floor, in a narrow one most of their codes are never used.

COAT centres the group, x -> (|x|/c)^k / s, and stores s, k, c as three fp32 (12 bytes a group). c and s cancel:
with a the largest |x|, (|x|/c)^k / s = 448 (|x|/a)^k. So two scalars are enough, and here they take 5 bytes:

- a as fp32. A bf16 would do for one encoding, but a second moment moves by a tenth of a bf16's step, and an a that is
  rounded to nearest keeps what it is: with beta2 = 0.999 it never fell. Rounded up it follows, in jumps, each of which
  rounds the whole group anew (scripts/bench/long_run.py);
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

The power is never computed. Each k has a table of the 126 values of |x|/a from which on a code is taken, made once in
fp64: no device has a logarithm of its own, so all give the same codes, and a CPU encodes faster than by log2 and exp2
(hf_lowmem/kernels/codecs/tables.py).
"""

from typing import ClassVar

import torch

from hf_lowmem.codecs.blocks import ErrorBound, KernelCodec
from hf_lowmem.kernels.codecs.tables import E4M3_MIN
from hf_lowmem.kernels.exact import E4M3_MAX


class Fp8ExpandCodec(KernelCodec):
    """`fp8_expand`: 1 + 5/128 = 1.039 bytes a value (COAT: 1.094). E4M3 `codes`, a (fp32), `power` (uint8).

    ```python
    a = max(abs(x))                                              # per group of 128
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

    Rounded at random a value has the code above or below it, so the error is up to twice that; the floor then holds
    for unsigned states alone, as a first moment may be zero for a step.

    To the nearest the floor holds for signed states too. A zero instead would be nearer by half a step, 2e-6 of the
    group's largest, but would change the group's smallest non-zero value and so its k at the next encoding. The price:
    where a group holds rows of very different size, and v is small with m, a first moment that is raised to 4e-6 of its
    group's largest makes the update explode: on the embedding of a fine-tuned SmolLM2 the worst error is 66 learning
    rates. For such a state, and as a rule for a first moment, take `int8_softsign`.

    For a first moment neither it nor `int8` is always the better one: the relative Frobenius error is 0.013
    against 0.011 on gaussian data and 0.010 against 0.014 on log-normal (sigma 1).
    """

    name: ClassVar[str] = "fp8_expand"
    block: ClassVar[int] = 128
    scalars: ClassVar[dict[str, torch.dtype]] = {"scale": torch.float32, "power": torch.uint8}
    # SMALLEST_B as a part of the largest value of a group that is just wide enough for the smallest k.
    smallest: ClassVar[float] = 2.0**-66
    # 2**-12: what rounding |x|/a and a threshold to fp32 adds near a tie, 2**-23 of each over the least k, with room.
    signed_bound: ClassVar[ErrorBound] = ErrorBound(1 / 3 + 2.0**-12, E4M3_MIN / E4M3_MAX)
    unsigned_bound: ClassVar[ErrorBound] = ErrorBound((16 / 15) ** (1 / 0.297) - 1 + 2.0**-12, 2.0**-49)
