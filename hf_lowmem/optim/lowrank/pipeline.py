"""Moments in the coordinates of a new basis, norms and factors: pure functions on fp32 tensors.

Shapes: a gradient is (..., m, n); leading dimensions are a batch of independent matrices (fused experts). The
projected gradient is (..., m, r) where m >= n and (..., r, n) otherwise: the larger dimension is kept, and its rows or
columns are the *channels*.

The steps that the family shares with its kernels, Adam's direction, the factors of channels and the limit on the growth
of norms, are in hf_lowmem/kernels/adamw/reference.py and kernels/apollo/reference.py.
"""

from torch import Tensor

from hf_lowmem.distributed import Whole
from hf_lowmem.kernels.apollo.reference import TINY, growth_


def tensor_scale(direction: Tensor, projected: Tensor, shards: Whole) -> Tensor:
    """One factor a matrix: ||N|| / (||R|| + 1e-8), (..., 1, 1), of projections that are cut (APOLLO-Mini)."""
    length, given = shards.norms(direction, projected, dim=(-2, -1), keepdim=True)
    return length / given.add_(TINY)


def growth_of_(x: Tensor, prev_norm: Tensor, shards: Whole) -> Tensor:
    """`growth_` of the norm of each matrix of `x`, (..., m, n), or of the matrix of which `x` is a part."""
    (norm,) = shards.norms(x, dim=(-2, -1))
    return growth_(norm, prev_norm)


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
