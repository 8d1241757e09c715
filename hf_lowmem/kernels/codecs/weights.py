"""The two stores of bf16 weights as functions on bits. What they are for: hf_lowmem/codecs/weights.py.

All integers, so that every device and a fused kernel give the same bits; random ones are a hash of (seed, index).
"""

import torch
from torch import Tensor

from hf_lowmem.kernels.exact import random_bits
from hf_lowmem.kernels.spans import spans


def round_stochastic(x: Tensor, seed: int) -> Tensor:
    """fp32 -> bf16, up or down at random, so that the expectation is `x`.

    ```python
    bits = x.view(int32) + (random_bits(seed, 0, x.numel()) & 0xFFFF)   # carries with the remainder's probability
    return (bits & 0xFFFF0000).view(float32).bfloat16()
    ```

    Args:
        x: any shape and strides; finite, or what it becomes is not. Values are counted along the shape.
        seed: of this call's random numbers; the same seed and shape give the same bits on every device.
    """
    flat = x.reshape(-1)
    out = torch.empty(flat.shape, dtype=torch.bfloat16, device=x.device)
    for start, stop in spans(flat.numel(), 1, x.device):
        noise = random_bits(seed, start, stop, x.device).bitwise_and_(0xFFFF)
        bits = noise.add_(flat[start:stop].view(torch.int32)).bitwise_and_(-(1 << 16))
        out[start:stop].copy_(bits.view(torch.float32))
    return out.view(x.shape)


def split_24(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> a bf16 and an int8 that `join_24` puts together to the upper 24 bits of `x`, rounded to nearest.

    The bf16 is the nearest to `x` but for ties, which go away from zero: the int8 holds -128 to 127 steps of 2**-8 of
    the bf16's unit in the last place. Relative error of the pair: 2**-16.
    """
    upper = (x.view(torch.int32) + (1 << 7)).bitwise_right_shift_(8)  # 24 bits, rounded; the sign is kept
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
