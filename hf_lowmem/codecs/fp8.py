"""Plain 8-bit floats, E4M3: 4 bits of exponent, 3 of mantissa, one scale for 128 values.

The simplest codec with a relative error: half a unit in the last of three mantissa bits, 6.25 %, over a
range of 448 / 2**-6 = 2.9e4, then three binades of subnormals. E5M2 would double the error for a range
which `fp8_expand` gets by other means.

The codes are kept as uint8, not as a float8 tensor: float8 cannot be gathered over gloo, and
`Optimizer.load_state_dict` would cast it to the parameter's dtype.
"""

from typing import ClassVar

import torch
from torch import Tensor

from hf_lowmem.codecs.blocks import BlockCodec, ErrorBound
from hf_lowmem.kernels.codecs.blocks import mark_nonzero
from hf_lowmem.kernels.codecs.dither import round_between, thresholds
from hf_lowmem.kernels.codecs.reference import look_up
from hf_lowmem.kernels.codecs.tables import E4M3_MIN, LARGEST_CODE, DeviceTable, e4m3_values
from hf_lowmem.kernels.exact import E4M3_MAX, FLOAT_MAX


def to_e4m3(x: Tensor) -> Tensor:
    """fp32 within [-448, 448] -> the nearest E4M3, ties to even, as uint8 of the same shape."""
    return x.to(torch.float8_e4m3fn).view(torch.uint8)


E4M3_TABLE = DeviceTable(e4m3_values)


class Fp8Codec(BlockCodec):
    """`fp8`: 1 + 4/128 = 1.031 bytes a value. E4M3 `codes` and absmax/448 of each group of 128, fp32.

    ```python
    scale = max(abs(x)) / 448                                  # per group
    codes = E4M3(clamp(x / scale, -448, 448))
    codes = where((x != 0) & ~signed, maximum(codes, 1), codes)
    x = codes.float() * scale
    ```
    Error: 2**-4 relative down to 2**-6 / 448 = 3.5e-5 of the group's largest; under that half a subnormal
    step, 2**-10 / 448 of the largest, or a whole step where the floor code of a second moment applies.

    Use `fp8_expand` for optimizer states; this one is its baseline, and the cheaper of the two to encode.
    """

    name: ClassVar[str] = "fp8"
    block: ClassVar[int] = 128
    scalars: ClassVar[dict[str, torch.dtype]] = {"scale": torch.float32}
    # The stored scale is at least 2**-117: the smallest code (2**-9) then decodes to a normal fp32.
    smallest: ClassVar[float] = E4M3_MAX * 2.0**-117
    # 2**-20: x / scale, scale and code * scale are each rounded to fp32 once, and 2**-20 is more than their
    # sum.
    signed_bound: ClassVar[ErrorBound] = ErrorBound(2.0**-4 + 2.0**-20, E4M3_MIN / 2 / E4M3_MAX)
    unsigned_bound: ClassVar[ErrorBound] = ErrorBound(2.0**-4 + 2.0**-20, E4M3_MIN / E4M3_MAX)

    def tables(self, signed: bool) -> tuple[DeviceTable, ...]:
        return (E4M3_TABLE,)

    def encode_rows(self, x: Tensor, signed: bool, words: Tensor | None) -> tuple[Tensor, ...]:
        largest = x.abs().amax(1) if signed else x.amax(1)
        # The upper limit keeps 448 * scale from rounding up to infinity when the largest value is near
        # fp32's own.
        scale = largest.div_(E4M3_MAX).clamp_(self.smallest / E4M3_MAX, FLOAT_MAX * (1 - 2.0**-23) / E4M3_MAX)
        q = x.div(scale[:, None]).clamp_(-E4M3_MAX if signed else 0.0, E4M3_MAX)
        codes = to_e4m3(q)
        if words is not None:
            table, sign = E4M3_TABLE.on(x.device), codes & 0x80
            nearest = codes.bitwise_and_(0x7F).int().clamp_(max=LARGEST_CODE)  # a nan's code is beyond
            u = thresholds(words)
            codes = round_between(q.abs(), nearest, lambda codes: look_up(table, codes), LARGEST_CODE, u, signed)
            codes = codes.to(torch.uint8).bitwise_or_(sign)
        if not signed:
            codes = torch.maximum(codes, mark_nonzero(x))
        return codes, scale

    def decode_rows(self, codes: Tensor, scalars: tuple[Tensor, ...], signed: bool) -> Tensor:
        return look_up(E4M3_TABLE.on(codes.device), codes).mul_(scalars[0][:, None])
