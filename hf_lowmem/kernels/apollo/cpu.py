"""APOLLO on a CPU: the norm of the rescaled gradient in one pass, the step of the weights in another, row by row.

Sums are taken in 64 parts of a row, then over the parts and the rows in fp64: in the same order with any number of
threads, so a run can be repeated bit for bit.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hf_lowmem.kernels._cpu import (
    TILE,
    float32,
    fma,
    in_parts,
    inlined,
    kernel,
    load_floats,
    part,
    random_words,
    uint32,
)
from hf_lowmem.kernels.adamw.reference import corrected_lr
from hf_lowmem.kernels.apollo import reference
from hf_lowmem.kernels.codecs.cpu import words_of
from hf_lowmem.kernels.exact import seed_keys
from hf_lowmem.kernels.step.cpu import KEEP, is_bad, load_weight, save_weight
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
def _norms(row, last, grad, bf16, shape, s, kind, squares, finite):
    """squares[row]: the sum of the squares of grad * s in that row of all matrices; a bad value clears the flag."""
    m, n = shape
    of_g, sums = np.empty(TILE, float32), np.empty(LANES, float32)
    while row < last:
        for j in range(LANES):
            sums[j] = float32(0.0)
        for column in range(0, n, TILE):
            count = min(TILE, n - column)
            g = load_floats(bf16, grad, row * n + column, count, of_g)
            if is_bad(g):
                finite[0] = 0
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
    """s as (parameters, matrices, channels), with room behind for a whole tile, and what its numbers are for."""
    kind = MATRIX if not per_channel else ROW if reference.channel_dim(shape) == -1 else COLUMN
    return torch.nn.functional.pad(s.reshape(len(s), shape[:-2].numel(), -1), (0, LANES)).numpy(), kind


def apollo_factors(
    grads: Sequence[Tensor],
    projected: Tensor,
    direction: Tensor,
    finite: Tensor,
    prev_norms: Sequence[Tensor],
    per_channel: bool,
    reach: float,
) -> tuple[Tensor, Tensor, Tensor]:
    shape, bf16 = grads[0].shape, grads[0].dtype == torch.bfloat16
    s = reference.rescaling(shape, projected, direction, per_channel)
    m, n = shape[-2:]
    count = shape[:-2].numel() * m
    found, kind = _of_matrices(s, shape, per_channel)
    squares, flags = np.empty((len(grads), count)), finite.numpy()
    for i, grad in enumerate(grads):
        of_grad = found[i], kind, squares[i], flags[i : i + 1]

        def part(first: int, last: int, of: tuple[object, ...] = (grad.data_ptr(), bf16, (m, n), *of_grad)) -> None:
            _norms(first, last, *of)

        in_parts(part, count, values=n)
    sums = torch.from_numpy(squares).view((*s.shape[:-2], m)).sum(-1)
    before = torch.stack([*prev_norms])
    norms = before.clone()
    factors = reference.growth_(sums.sqrt_().float(), norms)
    fine = factors.isfinite() & (norms * reach).isfinite()
    finite.mul_(fine.view(len(grads), -1).all(-1))
    return s, torch.where(fine, factors, 1.0), torch.where(fine, norms, before)


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
    shape = params[0].shape
    m, n = shape[-2:]
    matrices = shape[:-2].numel()
    found, kind = _of_matrices(s, shape, per_channel=s.shape[-2:].numel() > 1)
    store = WEIGHT_STORES.index("bf16_ecc" if corrections else "bf16_sr" if seeds else "keep")
    bf16 = params[0].dtype == torch.bfloat16, grads[0].dtype == torch.bfloat16
    for i, param in enumerate(params):
        if not finite[i]:
            skipped.add_(1)
            continue
        numbers = np.empty((matrices, 4), np.float32)
        numbers[:, 0] = factors[i].reshape(-1).numpy()
        numbers[:, 1:] = math.sqrt(scale), -corrected_lr(lr, (beta1, beta2), steps[i]), -lr * weight_decay
        where = param.data_ptr(), grads[i].data_ptr(), (corrections[i] if corrections else param).data_ptr()
        keys = words_of(*seed_keys(seeds[i] if seeds else 0))
        of_param = where, bf16, (m, n), found[i], kind, numbers, store, keys

        def part(first: int, last: int, of: tuple[object, ...] = of_param) -> None:
            _step(first, last, *of)

        in_parts(part, matrices * m, values=n)
        prev_norms[i].copy_(norms[i])
