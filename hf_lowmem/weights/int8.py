"""Weights as int8 codes with one scale for a group, as functions on tensors: w = code * scale.

An int8 has no fraction to keep an update in, so an update is rounded up or down at random, with the probabilities that
make its expectation exact. All arithmetic is fp32, and three details carry it over thousands of steps:

**A code's value is exact in fp32.** A scale has 17 significant bits and a code 7, and their product has 24. So a weight
that no update changes is divided by its scale to that very code, and nothing is left to round. With scales of 24 bits
one product in nine divides to a neighbour of the code, and a thousand updates of zero would move weights at random.

**Scales are sticky.** A group keeps its scale until its largest value is above 127 of it, or below 60. A scale derived
anew at each step would round every code of the group anew.

**A draw is compared as `u < fraction`.** The usual `floor(x + u)` rounds a whole number up where the sum is rounded.

The bf16 nearest to a weight lies within a quarter of a code of it (127 / 2**9), so codes come back exactly from the
bf16 values and the scales: a checkpoint is a plain bf16 model, and the scales beside it.
"""

import torch
from torch import Tensor

from hf_lowmem.kernels.codecs.dither import thresholds
from hf_lowmem.kernels.exact import paired_bits
from hf_lowmem.kernels.spans import spans

__all__ = ["GROUP", "decode", "decode_rows", "encode_", "group_of", "nbytes"]

GROUP = 128  # values that share a scale, where a row is divided by it
LEAST_GROUP = 32  # 1.125 bytes a weight
TOP = 127
BOTTOM = 60  # a group whose largest code would be below this has less than half the precision that it could have
TINY = 2.0**-100  # least scale: all values of codes are far above the least bf16
SPARE_BITS = 7  # of an fp32's 24, so that 17 are left


def group_of(shape: torch.Size) -> int | None:
    """Values that share a scale in a weight of this shape; None where its rows cannot be cut into groups.

    The largest power of two up to 128 that divides a row.
    """
    row = shape[-1] if len(shape) else 0
    group = min(row & -row, GROUP)
    return group if group >= LEAST_GROUP else None


def nbytes(values: int, group: int) -> int:
    """Bytes of codes and scales."""
    return values + 4 * (values // group)


def scale_of(largest: Tensor) -> Tensor:
    """The least scale of 17 bits whose 127-fold is not below the largest magnitude of a group; NaN or Inf stays."""
    bits = (largest / TOP).clamp_(min=TINY).view(torch.int32)
    up = bits.add((1 << SPARE_BITS) - 1).bitwise_and_(-(1 << SPARE_BITS)).view(torch.float32)
    return torch.where(largest.isfinite(), up, largest)


def encode_(
    values: Tensor,
    codes: Tensor,
    scale: Tensor,
    *,
    group: int,
    seed: int | None = None,
    first: int = 0,
    bottom: int = BOTTOM,
) -> None:
    """Write fp32 values over codes and scales, all of them flat.

    ```python
    scale = scale if 60 * scale <= max(abs(values)) <= 127 * scale else scale_of(max(abs(values)))   # of each group
    codes = floor(values / scale) + (u < values / scale - floor(values / scale))                     # with a seed
    ```

    Args:
        seed: of the random numbers; None rounds to the nearest, as a weight is that is encoded for the first time.
        first: place in the whole parameter of the first value, which decides what it draws.
        bottom: the least that a group's largest code may be before its scale is derived anew.
    """
    for start, stop in spans(values.numel(), group, values.device):
        part, s = values[start:stop].view(-1, group), scale[start // group : stop // group]
        largest = torch.maximum(part.amax(1), part.amin(1).neg_())
        stays = ((largest <= s * TOP) & (largest >= s * bottom)) | (largest == 0)
        s.copy_(torch.where(stays, s, scale_of(largest)))
        scaled = part / s[:, None]
        if seed is None:
            code = scaled.round_()
        else:
            code = scaled.floor()
            u = thresholds(paired_bits(seed, first + start, first + stop, values.device))
            code.add_(u.view_as(code) < scaled.sub_(code))
        codes[start:stop].view(-1, group).copy_(code.clamp_(-TOP, TOP))


def decode(
    codes: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype, *, group: int, out: Tensor | None = None
) -> Tensor:
    """The values, exact in fp32 and rounded to nearest in bf16. One pass over memory, without an fp32 copy.

    Args:
        out: where to write them.
    """
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=codes.device)
    torch.mul(codes.view(-1, group), scale[:, None], out=out.view(-1, group))
    return out


def decode_rows(codes: Tensor, scale: Tensor, rows: Tensor, width: int, dtype: torch.dtype, *, group: int) -> Tensor:
    """Some rows of a matrix of rows of `width` values: (len(rows), width)."""
    some = codes.view(-1, width).index_select(0, rows)
    scales = scale.view(-1, width // group).index_select(0, rows)
    return decode(some.view(-1), scales.view(-1), torch.Size([len(rows), width]), dtype, group=group)
