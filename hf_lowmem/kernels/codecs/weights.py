"""The two stores of bf16 weights as functions on bits. What they are for: hf_lowmem/weights.

All integers, so that every device and a fused kernel give the same bits; random ones are a hash of (seed, index).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_lowmem.kernels.exact import grouped_bits
from hf_lowmem.kernels.spans import spans


def round_stochastic(x: Tensor, seed: int, offset: int = 0) -> Tensor:
    """fp32 -> bf16, up or down at random, so that the expectation is `x`.

    ```python
    bits = x.view(int32) + (grouped_bits(seed, 0, x.numel()) & 0xFFFF)   # carries with the remainder's probability
    return (bits & 0xFFFF0000).view(float32).bfloat16()
    ```

    Args:
        x: any shape and strides; finite, or what it becomes is not. Values are counted along the shape.
        seed: of this call's random numbers; the same seed and shape give the same bits on every device.
        offset: index of the first value, where `x` is a part of something longer.
    """
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    round_by_(lambda start, stop, device: grouped_bits(seed, offset + start, offset + stop, device), x, out)
    return out


def round_by_(words: Callable[[int, int, torch.device], Tensor], x: Tensor, to: Tensor) -> None:
    """Write `round_stochastic` of `x` into `to` (contiguous), random bits, int32, by `words(start, stop, device)`."""
    flat, out = x.reshape(-1), to.view(-1)
    for start, stop in spans(flat.numel(), 1, x.device):
        noise = words(start, stop, x.device).bitwise_and_(0xFFFF)
        bits = noise.add_(flat[start:stop].view(torch.int32)).bitwise_and_(-(1 << 16))
        out[start:stop].copy_(bits.view(torch.float32))


def split_24(x: Tensor, seed: int | None = None, offset: int = 0) -> tuple[Tensor, Tensor]:
    """fp32 -> a bf16 and an int8 that `join_24` puts together to the upper 24 bits of `x`.

    Rounded to nearest, or with a seed up or down at random, so that the expectation is `x`: an update below 2**-17 of
    its weight is otherwise lost, as in bf16 one below 2**-9 is.

    The bf16 is the nearest to the pair but for ties, which go away from zero: the int8 holds -128 to 127 steps of 2**-8
    of the bf16's unit in the last place. Relative error of the pair: 2**-16, at random 2**-15. `seed` and `offset`: as
    for `round_stochastic`.
    """
    bits = x.contiguous().view(torch.int32)
    if seed is None:
        upper = bits + (1 << 7)
    else:
        upper = grouped_bits(seed, offset, offset + x.numel(), x.device).bitwise_and_(0xFF).view(x.shape).add_(bits)
    upper.bitwise_right_shift_(8)  # 24 bits; the sign is kept
    coarse = (upper + (1 << 7)).bitwise_right_shift_(8)
    correction = upper.sub_(coarse.bitwise_left_shift(8)).to(torch.int8)
    return coarse.bitwise_left_shift_(16).view(torch.float32).bfloat16(), correction


def join_24(weight: Tensor, correction: Tensor) -> Tensor:
    """The fp32 value of a bf16 and its int8 correction; `weight` alone where the correction is zero.

    Where somebody else has written the weight since, the correction is still no more than half a unit in its last
    place, and never turns a zero into a negative magnitude, which would be the bits of a NaN.
    """
    bits = weight.abs().float().view(torch.int32).add_(correction.int().bitwise_left_shift_(8)).clamp_(min=0)
    return bits.view(torch.float32).copysign(weight.float())
