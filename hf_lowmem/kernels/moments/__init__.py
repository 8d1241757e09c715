"""Adam on projected gradients in two calls: the direction first, and the moments when it is known that they are taken.

What a low-rank method makes of the direction may still turn out not to be finite, and then nothing of it may stay. So
the first call reads the encoded moments and writes none; the second computes them again, from the same numbers, and
encodes them. They are a small part of the weights' size, so twice costs less than copies to go back to.
"""

import torch
from torch import Tensor

from hf_lowmem.kernels.moments import reference
from hf_lowmem.kernels.moments.cases import direction_cases, moments_cases
from hf_lowmem.kernels.registry import Kernel

__all__ = ["ADAM_DIRECTION", "ADAM_MOMENTS"]


def _fake(projected: Tensor, *args: object) -> Tensor:
    return torch.empty_like(projected)


ADAM_DIRECTION = Kernel(
    name="adam_direction",
    reference=reference.adam_direction,
    triton="hf_lowmem.kernels.moments.triton:adam_direction",
    cpu="hf_lowmem.kernels.moments.cpu:adam_direction",
    fake=_fake,
    mutates=("finite",),
    cases=direction_cases,
)
ADAM_MOMENTS = Kernel(
    name="adam_moments",
    reference=reference.adam_moments,
    triton="hf_lowmem.kernels.moments.triton:adam_moments",
    cpu="hf_lowmem.kernels.moments.cpu:adam_moments",
    mutates=("first", "second"),
    cases=moments_cases,
)
