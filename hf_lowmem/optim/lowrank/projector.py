"""Projections of a gradient to a small rank.

`random` keeps nothing but a number: its Gaussian matrix is drawn again at each step from a seed that is a hash of the
parameter's name and of the number of the refresh. The authors' packages keep the matrix (and a Python object that holds
it, which `torch.load(weights_only=True)` refuses). A seed taken from a parameter's position in a list would change with
every layer that is added.
"""

import math

import torch
from torch import Tensor

from hf_lowmem.optim.base import stream_key
from hf_lowmem.optim.lowrank.pipeline import channel_dim


class RandomProjector:
    """Gaussian projection with variance 1/rank, regenerated from its seed.

    ```python
    P = randn(d, rank) / sqrt(rank)        # d = min(m, n); new after each `update_gap` steps
    low = grad @ P                         # (..., m, n) -> (..., m, r)     where m >= n
    low = P.T @ grad                       # (..., m, n) -> (..., r, n)     otherwise
    ```

    Source: APOLLO, arXiv 2412.05270, section 4.2.

    Args:
        rank: r.
        update_gap: steps between two matrices.
        key: start of the parameter's random stream.
    """

    def __init__(self, rank: int, update_gap: int, key: int) -> None:
        self.rank = rank
        self.update_gap = update_gap
        self.key = key

    def matrix(self, small: int, step: int, device: torch.device) -> Tensor:
        """P, (small, rank), for the update with this number, counted from 0."""
        generator = torch.Generator(device).manual_seed(stream_key(self.key, step // self.update_gap))
        drawn = torch.randn(small, self.rank, generator=generator, device=device, dtype=torch.float32)
        return drawn.div_(math.sqrt(self.rank))

    def down(self, grad: Tensor, step: int) -> Tensor:
        """The projected gradient; `step` counts from 0."""
        matrix = self.matrix(min(grad.shape[-2:]), step, grad.device)
        return grad @ matrix if channel_dim(grad.shape) == -1 else matrix.mT @ grad
