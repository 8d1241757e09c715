"""APOLLO's factors and its step in torch, and the limit on the growth of norms, which Fira shares.

Shapes: a gradient is (..., m, n); leading dimensions are a batch of independent matrices (fused experts). Its
projection is (..., m, r) where m >= n and (..., r, n) otherwise; the rows or columns of the larger side are *channels*.
"""

import math

import torch
from torch import Tensor

from hf_lowmem.kernels.adamw.reference import descend_
from hf_lowmem.kernels.step.reference import load_weight, save_weight

GROWTH_LIMIT = 1.01  # Fira, arXiv 2410.01623, section 4.3 (gamma)
TINY = 1e-8


def channel_dim(shape: torch.Size) -> int:
    """The dimension that a channel's norm runs over: -1 where m >= n, so that each row is a channel; else -2."""
    return -1 if shape[-2] >= shape[-1] else -2


def channel_scale(direction: Tensor, projected: Tensor, dim: int) -> Tensor:
    """Factor by which Adam would enlarge each channel: ||N_j|| / (||R_j|| + 1e-8), (..., m, 1) or (..., 1, n).

    APOLLO, arXiv 2412.05270, equation 5.
    """
    return direction.norm(dim=dim, keepdim=True) / projected.norm(dim=dim, keepdim=True).add_(TINY)


def tensor_scale(direction: Tensor, projected: Tensor) -> Tensor:
    """One factor a matrix: ||N|| / (||R|| + 1e-8), (..., 1, 1). APOLLO-Mini, arXiv 2412.05270, section 4.3."""
    return direction.norm(dim=(-2, -1), keepdim=True) / projected.norm(dim=(-2, -1), keepdim=True).add_(TINY)


def growth_(norm: Tensor, prev_norm: Tensor) -> Tensor:
    """Divisor of a matrix that keeps its norm at most 1.01 times the previous one; `prev_norm` becomes the new norm.

    Both norms are (...). A previous norm of zero means that there was none: a matrix whose gradient was once all zero
    would otherwise be held near zero for thousands of steps. Fira, arXiv 2410.01623, equation 8.
    """
    factor = (norm / (prev_norm + TINY)).clamp_(min=GROWTH_LIMIT).div_(GROWTH_LIMIT)
    factor = torch.where(prev_norm > 0, factor, torch.ones_like(factor))
    prev_norm.copy_(norm / factor)
    return factor


def limit_norm_growth_(x: Tensor, prev_norm: Tensor) -> Tensor:
    """Scale each matrix of `x` (..., m, n) so that its norm grows by 1 % at most, in place; see `growth_`."""
    return x.div_(growth_(x.norm(dim=(-2, -1)), prev_norm)[..., None, None])


def rescaling(shape: torch.Size, projected: Tensor, direction: Tensor, per_channel: bool) -> Tensor:
    """s of a gradient of `shape`: for each channel, or for each matrix."""
    return (
        channel_scale(direction, projected, channel_dim(shape)) if per_channel else tensor_scale(direction, projected)
    )


def apollo_update(
    grad: Tensor, projected: Tensor, direction: Tensor, prev_norm: Tensor, *, per_channel: bool, scale: float
) -> Tensor:
    """The update of a matrix, limit_growth(grad * s) * sqrt(scale), all fp32; `apollo_factors` for the arguments."""
    x = grad * rescaling(grad.shape, projected, direction, per_channel)
    return limit_norm_growth_(x, prev_norm).mul_(math.sqrt(scale))


def apollo_factors(
    grad: Tensor, projected: Tensor, direction: Tensor, prev_norm: Tensor, per_channel: bool
) -> tuple[Tensor, Tensor]:
    """The factor s by which APOLLO multiplies a gradient, and the divisor after it, `growth_` of the norm of grad * s.

    Args:
        grad: (..., m, n) of any float dtype.
        projected: the projected gradient R, fp32 (..., m, r) or (..., r, n).
        direction: Adam's direction N for it, of the same shape.
        prev_norm: fp32 (...), norm of the last update; changed in place.
        per_channel: one s for each channel, (..., m, 1) or (..., 1, n), or (Mini) for each matrix, (..., 1, 1).
    """
    s = rescaling(grad.shape, projected, direction, per_channel)
    return s, growth_((grad.to(torch.float32) * s).norm(dim=(-2, -1)), prev_norm)


def apollo_factors_fake(
    grad: Tensor, projected: Tensor, direction: Tensor, prev_norm: Tensor, per_channel: bool
) -> tuple[Tensor, Tensor]:
    shape = [*grad.shape[:-2], 1, 1]
    if per_channel:
        shape[-2 if channel_dim(grad.shape) == -1 else -1] = max(grad.shape[-2:])
    return projected.new_empty(shape), torch.empty_like(prev_norm)


def update_by_factors(grad: Tensor, s: Tensor, factor: Tensor, scale: float) -> Tensor:
    """The result of `apollo_update`, from its factors: grad * s / factor * sqrt(scale)."""
    return (grad * s).div_(factor[..., None, None]).mul_(math.sqrt(scale))


def apollo_step(
    param: Tensor,
    grad: Tensor,
    correction: Tensor | None,
    finite: Tensor,
    s: Tensor,
    factor: Tensor,
    scale: float,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    step: int,
    seed: int | None,
) -> None:
    """Step the weight by its rescaled gradient, in place; leave it where not `finite`.

    Args:
        param: (..., m, n), contiguous, of bf16, fp16 or fp32.
        grad: of its shape, contiguous, of any of these dtypes.
        correction: int8 of its shape, for a bf16 weight of 24 bits.
        finite: one bool.
        s, factor: from `apollo_factors`.
        scale: the authors' `scale`; its root multiplies the update.
        step: number of this update, from 1.
        seed: rounds a bf16 weight at random.
    """
    if finite:
        weights = load_weight(param, correction)
        update = update_by_factors(grad.to(torch.float32), s, factor, scale)
        descend_(weights, update, lr, (beta1, beta2), weight_decay, step)
        save_weight(param, weights, correction, seed)
