"""APOLLO on a CPU: the norm of the rescaled gradient in one pass, the step of the weights in another, row by row.

Sums are taken in 64 parts of a row, then over the parts and the rows in fp64: in the same order with any number of
threads, so a run can be repeated bit for bit.
"""

import math

import numpy as np
import torch
from torch import Tensor

from hf_lowmem.kernels._cpu import TILE, float32, fma, in_parts, inlined, kernel, part, random_words, uint32
from hf_lowmem.kernels.adamw.reference import corrected_lr
from hf_lowmem.kernels.apollo import reference
from hf_lowmem.kernels.codecs.cpu import words_of
from hf_lowmem.kernels.exact import seed_keys
from hf_lowmem.kernels.step.cpu import KEEP, load_floats, load_weight, save_weight
from hf_lowmem.specs import WEIGHT_STORES

LANES = 64
MATRIX, ROW, COLUMN = 0, 1, 2  # what a number of s is for


@inlined
def _add_squares(g, s, sums):
    for j in range(LANES):
        x = g[j] * s
        sums[j] += x * x


@inlined
def _add_squares_by_column(g, s, sums):
    for j in range(LANES):
        x = g[j] * s[j]
        sums[j] += x * x


@inlined
def _descend(w, g, s, x):
    """x: factor, root of the scale, step, decay."""
    for j in range(len(w)):
        moved = fma((g[j] * s) / x[0] * x[1], x[2], w[j])
        w[j] = fma(moved, x[3], moved)


@inlined
def _descend_by_column(w, g, s, x):
    for j in range(len(w)):
        moved = fma((g[j] * s[j]) / x[0] * x[1], x[2], w[j])
        w[j] = fma(moved, x[3], moved)


@kernel
def _norms(row, last, grad, bf16, shape, s, kind, squares):
    """squares[row]: the sum of the squares of grad * s in that row of all matrices."""
    m, n = shape
    of_g, sums = np.empty(TILE, float32), np.empty(LANES, float32)
    while row < last:
        for j in range(LANES):
            sums[j] = float32(0.0)
        for column in range(0, n, TILE):
            count = min(TILE, n - column)
            g = load_floats(bf16, grad, row * n + column, count, of_g)
            for start in range(0, count, LANES):
                if kind == COLUMN:
                    of_s = part(s[row // m], column + start, LANES)
                    _add_squares_by_column(part(g, start, LANES), of_s, sums)
                else:
                    _add_squares(part(g, start, LANES), s[row // m, row % m if kind == ROW else 0], sums)
        total = 0.0
        for j in range(LANES):
            total += sums[j]
        squares[row] = total
        row += 1


@kernel
def _step(row, last, address, bf16, shape, s, kind, numbers, store, keys):
    """address: of weights, gradients and corrections; numbers: of each matrix, as `_descend` has them."""
    (param, grad, correction), (m, n) = address, shape
    of_w, of_g, words = np.empty(TILE, float32), np.empty(TILE, float32), np.empty(TILE, uint32)
    while row < last:
        for column in range(0, n, TILE):
            count, start = min(TILE, n - column), row * n + column
            g = load_floats(bf16[1], grad, start, count, of_g)
            w = load_weight(store, bf16[0], param, correction, start, count, of_w)
            here = part(w, 0, count)
            if kind == COLUMN:
                _descend_by_column(here, part(g, 0, count), part(s[row // m], column, count), numbers[row // m])
            else:
                of_row = s[row // m, row % m if kind == ROW else 0]
                _descend(here, part(g, 0, count), of_row, numbers[row // m])
            if store != KEEP:
                random_words(start, keys[0], keys[1], uint32(0), words)
            save_weight(store, bf16[0], param, correction, start, count, w, words)
        row += 1


def _of_matrices(s: Tensor, shape: torch.Size, per_channel: bool) -> tuple[np.ndarray, int]:
    """s as (matrices, channels), with room behind for a whole tile, and what its numbers are for."""
    kind = MATRIX if not per_channel else ROW if reference.channel_dim(shape) == -1 else COLUMN
    return torch.nn.functional.pad(s.reshape(shape[:-2].numel(), -1), (0, LANES)).numpy(), kind


def apollo_factors(
    grad: Tensor, projected: Tensor, direction: Tensor, prev_norm: Tensor, per_channel: bool
) -> tuple[Tensor, Tensor]:
    s = reference.rescaling(grad.shape, projected, direction, per_channel)
    m, n = grad.shape[-2:]
    matrices = grad.shape[:-2].numel()
    grad = grad.contiguous()
    squares = torch.empty(matrices * m, dtype=torch.float64, device="cpu")
    where, bf16, out = grad.data_ptr(), grad.dtype == torch.bfloat16, squares.numpy()
    found, kind = _of_matrices(s, grad.shape, per_channel)
    in_parts(lambda first, last: _norms(first, last, where, bf16, (m, n), found, kind, out), matrices * m, values=n)
    norm = squares.view(*grad.shape[:-2], m).sum(-1).sqrt_().float()
    return s, reference.growth_(norm, prev_norm)


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
    if not finite:
        return
    m, n = param.shape[-2:]
    matrices = param.shape[:-2].numel()
    found, kind = _of_matrices(s, param.shape, per_channel=s.shape[-2:].numel() > 1)
    numbers = np.empty((matrices, 4), np.float32)
    numbers[:, 0] = factor.reshape(-1).numpy()
    numbers[:, 1:] = math.sqrt(scale), -corrected_lr(lr, (beta1, beta2), step), -lr * weight_decay
    store = WEIGHT_STORES.index("bf16_ecc" if correction is not None else "keep" if seed is None else "bf16_sr")
    keys = words_of(*seed_keys(seed or 0))
    bf16 = param.dtype == torch.bfloat16, grad.dtype == torch.bfloat16
    where = param.data_ptr(), grad.data_ptr(), (param if correction is None else correction).data_ptr()
    in_parts(
        lambda first, last: _step(first, last, where, bf16, (m, n), found, kind, numbers, store, keys),
        matrices * m,
        values=n,
    )
