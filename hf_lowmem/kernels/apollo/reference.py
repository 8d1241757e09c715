"""APOLLO's factors and its step in torch, and the limit on the growth of norms, which Fira shares.

Shapes: a gradient is (..., m, n); leading dimensions are a batch of independent matrices (fused experts). Its
projection is (..., m, r) where m >= n and (..., r, n) otherwise; the rows or columns of the larger side are *channels*.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_lowmem.kernels.adamw.reference import descend_
from hf_lowmem.kernels.step.reference import is_finite_gradient, load_weight, save_weight

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
    grads: Sequence[Tensor],
    projected: Tensor,
    direction: Tensor,
    finite: Tensor,
    prev_norms: Sequence[Tensor],
    per_channel: bool,
    reach: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors and divisors of k gradients of one shape, and their norms afterwards.

    A gradient is multiplied by s, a factor for each channel, and divided by `growth_` of the norm of grad * s.
    Gradients are judged in the same pass that sums their norm.

    Args:
        grads: k of (..., m, n), contiguous, of one float dtype.
        projected: the projected gradients R, fp32 (k, ..., m, r) or (k, ..., r, n), contiguous.
        direction: Adam's direction N for them, of the same shape.
        finite: int32 (k,); set to 0 where a gradient has a NaN, an Inf or more than 1e15, where the divisor or the new
            norm is not finite, and where the norm times `reach` is not.
        prev_norms: fp32 (...) each, norms of the last updates. Only read.
        per_channel: one s for each channel, (k, ..., m, 1) or (k, ..., 1, n), or (Mini) a matrix, (k, ..., 1, 1).
        reach: how far the weights may move for an update of norm 1.

    Returns:
        s; the divisors (k, ...), 1 for a matrix whose norm is not finite; the norms (k, ...), the last one for such.
    """
    s = rescaling(grads[0].shape, projected, direction, per_channel)
    factors, norms = torch.empty(s.shape[:-2], device=s.device), torch.empty(s.shape[:-2], device=s.device)
    for i, (grad, prev_norm) in enumerate(zip(grads, prev_norms, strict=True)):
        x = grad.to(torch.float32)
        norm = prev_norm.clone()
        factor = growth_((x * s[i]).norm(dim=(-2, -1)), norm)
        fine = factor.isfinite() & (norm * reach).isfinite()
        finite[i].mul_(fine.all() & is_finite_gradient(x))
        factors[i] = torch.where(fine, factor, 1.0)
        norms[i] = torch.where(fine, norm, prev_norm)
    return s, factors, norms


def apollo_factors_fake(
    grads: Sequence[Tensor],
    projected: Tensor,
    direction: Tensor,
    finite: Tensor,
    prev_norms: Sequence[Tensor],
    per_channel: bool,
    reach: float,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = [*projected.shape[:-2], 1, 1]
    if per_channel:
        shape[-2 if channel_dim(grads[0].shape) == -1 else -1] = max(grads[0].shape[-2:])
    return projected.new_empty(shape), projected.new_empty(shape[:-2]), projected.new_empty(shape[:-2])


def update_by_factors(grad: Tensor, s: Tensor, factor: Tensor, scale: float) -> Tensor:
    """The result of `apollo_update`, from its factors: grad * s / factor * sqrt(scale)."""
    return (grad * s).div_(factor[..., None, None]).mul_(math.sqrt(scale))


def apollo_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    corrections: Sequence[Tensor],
    finite: Tensor,
    skipped: Tensor,
    prev_norms: Sequence[Tensor],
    s: Tensor,
    factors: Tensor,
    norms: Tensor,
    seeds: Sequence[int],
    steps: Sequence[int],
    scale: float,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> None:
    """Step k weights of one shape by their rescaled gradients, in place, and keep the norms; not where not `finite`.

    Args:
        params: k of (..., m, n), contiguous, all bf16, fp16 or fp32.
        grads: of that shape, contiguous, of any one of these dtypes.
        corrections: int8 of that shape, for bf16 weights of 24 bits; else none.
        finite: int32 (k,), one a weight.
        skipped: one int64, to which the number of weights that are left is added.
        prev_norms: fp32 (...) each, which become `norms`.
        s, factors, norms: from `apollo_factors`.
        seeds: round bf16 weights at random, one a weight; else none.
        steps: number of this update of each weight, from 1.
        scale: the authors' `scale`; its root multiplies the update.
    """
    for i, (param, grad, prev_norm) in enumerate(zip(params, grads, prev_norms, strict=True)):
        if not finite[i]:
            skipped.add_(1)
        else:
            correction = corrections[i] if corrections else None
            weights = load_weight(param, correction)
            update = update_by_factors(grad.to(torch.float32), s[i], factors[i], scale)
            descend_(weights, update, lr, (beta1, beta2), weight_decay, steps[i])
            save_weight(param, weights, correction, seeds[i] if seeds else None)
            prev_norm.copy_(norms[i])
