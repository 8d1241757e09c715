"""The steps that the low-rank family shares, as pure functions on fp32 tensors.

Shapes: a gradient is (..., m, n); leading dimensions are a batch of independent matrices (fused experts). The
projected gradient is (..., m, r) where m >= n and (..., r, n) otherwise: the larger dimension is kept, and its rows or
columns are the *channels*.

The family's semantics differ from torch.optim.AdamW's, as in the authors' code: eps is added before bias correction,
which is a factor on the step size, and decay follows the update.
"""

import math

import torch
from torch import Tensor

GROWTH_LIMIT = 1.01  # Fira, arXiv 2410.01623, section 4.3 (gamma)
TINY = 1e-8


def adam_direction(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, betas: tuple[float, float], eps: float) -> Tensor:
    """Update both moments in place and return m / (sqrt(v) + eps), without bias correction."""
    beta1, beta2 = betas
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    return exp_avg / exp_avg_sq.sqrt().add_(eps)


def corrected_lr(lr: float, betas: tuple[float, float], step: int) -> float:
    """Learning rate times Adam's bias correction; `step` counts from 1."""
    return lr * math.sqrt(1 - betas[1] ** step) / (1 - betas[0] ** step)


def channel_dim(shape: torch.Size) -> int:
    """The dimension that a channel's norm runs over: -1 where m >= n, so that each row is a channel; else -2."""
    return -1 if shape[-2] >= shape[-1] else -2


def channel_scale(direction: Tensor, low: Tensor, dim: int) -> Tensor:
    """How much Adam would enlarge each channel: ||N_j|| / (||R_j|| + 1e-8), (..., m, 1) or (..., 1, n).

    APOLLO, arXiv 2412.05270, equation 5.
    """
    return direction.norm(dim=dim, keepdim=True) / low.norm(dim=dim, keepdim=True).add_(TINY)


def tensor_scale(direction: Tensor, low: Tensor) -> Tensor:
    """One factor a matrix: ||N|| / (||R|| + 1e-8), (..., 1, 1). APOLLO-Mini, arXiv 2412.05270, section 4.3."""
    return direction.norm(dim=(-2, -1), keepdim=True) / low.norm(dim=(-2, -1), keepdim=True).add_(TINY)


def limit_norm_growth_(x: Tensor, prev_norm: Tensor) -> Tensor:
    """Scale each matrix of `x` so that its norm is at most 1.01 times the last one, which it replaces.

    `x` (..., m, n) and `prev_norm` (...) are changed in place. A previous norm of zero means that there was none: a
    matrix whose gradient was once all zero would otherwise be held near zero for thousands of steps.
    Fira, arXiv 2410.01623, equation 8.
    """
    norm = x.norm(dim=(-2, -1))
    factor = (norm / (prev_norm + TINY)).clamp_(min=GROWTH_LIMIT).div_(GROWTH_LIMIT)
    factor = torch.where(prev_norm > 0, factor, torch.ones_like(factor))
    prev_norm.copy_(norm / factor)
    return x.div_(factor[..., None, None])


def rotate_first(exp_avg: Tensor, rotation: Tensor, right: bool) -> Tensor:
    """The first moment in the coordinates of a new basis: m @ Q, or Q.T @ m, with Q = P_old.T @ P_new (..., r, r).

    What of it lies outside of the new basis is dropped. LDAdam, arXiv 2410.16103.
    """
    return exp_avg @ rotation if right else rotation.mT @ exp_avg


def rotate_second(exp_avg_sq: Tensor, rotation: Tensor, right: bool) -> Tensor:
    """The second moment in the coordinates of a new basis.

    ```python
    w = Q**2                                             # (r, r), each column sums to at most 1
    v = v @ w + (1 - w.sum(0)) * v.mean(-1)              # m >= n; each row is a channel
    ```

    The variance of a sum of uncorrelated coordinates is the sum of their variances, by squared weights. A new direction
    lies partly outside of the old basis, where nothing is known; that part takes the channel's mean. So every new value
    is a weighted mean of the channel's old ones: never negative, and never so small that the next step explodes, as
    v @ w alone would be for a direction that is all new.
    """
    weights = rotation.square()
    rest = (1 - weights.sum(-2, keepdim=True)).clamp_(min=0)  # (..., 1, r); below 0 only by rounding
    if right:
        return exp_avg_sq @ weights + rest * exp_avg_sq.mean(-1, keepdim=True)
    return weights.mT @ exp_avg_sq + rest.mT * exp_avg_sq.mean(-2, keepdim=True)
