"""How a bf16 weight is written so that small updates are not lost.

A bf16 weight has 8 significant bits. An update below a 512th of it rounds to nothing, which at the learning rates of
fine-tuning is most of them. The usual cure is an fp32 copy of every weight, 4 bytes more. Here are two cheaper ones; in
both the model's own weights are plain bf16, so saving, inference and other tools see nothing.

`bf16_sr` keeps nothing: a weight is rounded up or down at random, with the probabilities that make the expectation
exact. `bf16_ecc` keeps 8 bits more of the weight as an int8: 24 bits in all, for 3 bytes.

Both work on the bits as integers. The bits of a float, without its sign, have the order of its magnitude, so a bf16 is
the upper half of an fp32 and "the remainder" is a difference of integers, exact in every binade and at its borders. The
remainder as a float (a fraction of half a unit in the last place) would need the unit's size, which changes there.
"""

import torch
from torch import Tensor


def round_stochastic(x: Tensor, seed: int) -> Tensor:
    """fp32 -> bf16, up or down at random, so that the expectation is `x`.

    ```python
    bits = x.view(int32) + randint(0, 2**16)     # carries into the upper half with the remainder's probability
    return (bits & 0xFFFF0000).view(float32).bfloat16()
    ```

    Args:
        x: any shape and strides; finite, or what it becomes is not.
        seed: of this call's random numbers; the same seed, shape and kind of device give the same bits.
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    noise = torch.randint(0, 1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    return noise.add_(x.view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32).bfloat16()


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
