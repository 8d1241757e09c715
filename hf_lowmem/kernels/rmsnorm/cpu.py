"""RMSNorm on a CPU, a row at a time: it is read once, and stays in the cache for what is made of it.

Sums go by pairs as the reference's do, one level after another between two buffers: a loop that reads what it writes is
no vector.
"""

import numpy as np
import torch
from torch import Tensor

from hf_lowmem.kernels._cpu import (
    TILE,
    float32,
    floats_at,
    halves_at,
    in_parts,
    inlined,
    kernel,
    part,
    plain_words,
    store_floats,
    to_bf16,
    uint32,
    widened,
)
from hf_lowmem.kernels.codecs.cpu import words_of
from hf_lowmem.kernels.exact import seed_keys
from hf_lowmem.kernels.quantize.cpu import decode_span, encode_span, rule_of
from hf_lowmem.kernels.quantize.reference import GROUPS
from hf_lowmem.kernels.rmsnorm.reference import out_dtype, parts_of, sum_pairs

E4M3 = rule_of("e4m3", None, torch.float32)[0]
GROUP = GROUPS["e4m3"].group


@inlined
def _load(bf16, address, start, x):
    """All of a row, as fp32."""
    if bf16:
        halves = halves_at(address + 2 * start, len(x))
        for j in range(len(x)):
            x[j] = widened(halves[j])
    else:
        floats = floats_at(address + 4 * start, len(x))
        for j in range(len(x)):
            x[j] = floats[j]


@inlined
def _multiply(x, y, out):
    for j in range(len(x)):
        out[j] = x[j] * y[j]


@inlined
def _halve(x, count, out):
    """Sums of neighbours; the last of an odd number is added to zero."""
    for j in range(count // 2):
        out[j] = x[2 * j] + x[2 * j + 1]
    if count % 2:
        out[count // 2] = x[count - 1] + float32(0.0)


@inlined
def _sum(x, room):
    """The sum of x, which is overwritten. Reference: `sum_pairs`."""
    count, levels = len(x), 0
    while 1 << levels < count:
        levels += 1
    for level in range(levels):
        if level % 2:
            _halve(room, count, x)
        else:
            _halve(x, count, room)
        count = (count + 1) // 2
    return room[0] if levels % 2 else x[0]


@inlined
def _inverse_rms(x, eps, terms, room):
    """1 / sqrt(mean(x**2) + eps). Reference: `root`."""
    for j in range(len(x)):
        terms[j] = x[j] * x[j]
    return float32(1.0) / np.sqrt(_sum(terms, room) / float32(len(x)) + eps)


@inlined
def _normalise(x, inverse, factor, rounded, out):
    for j in range(len(x)):
        y = x[j] * inverse
        out[j] = (widened(to_bf16(y)) if rounded else y) * factor[j]


@inlined
def _gradients(dy, x, inverse, mean, factor, out, total):
    """dx to `out`; dy * x_hat is added to `total`."""
    for j in range(len(x)):
        x_hat = x[j] * inverse
        out[j] = (dy[j] * factor[j] - x_hat * mean) * inverse
        total[j] = total[j] + dy[j] * x_hat


@inlined
def _weighted(dy, x, inverse, factor, terms):
    for j in range(len(x)):
        terms[j] = (dy[j] * factor[j]) * (x[j] * inverse)


@inlined
def _add(x, y):
    for j in range(len(x)):
        x[j] = x[j] + y[j]


@kernel
def _forward(row, last, where, bf16, rule, how, keys):
    """Rows of the norm. where: addresses of the input, its codes and scales, the output; bf16: whether input and output
    are. rule: factor, eps, whether x_hat is rounded. how: of `encode_span`; a largest scale of 0: x is in codes."""
    (source, codes, scales, out), (factor, eps, rounded) = where, rule
    n = len(factor)
    groups = (n + GROUP - 1) // GROUP
    x, y, terms, room = np.empty(n, float32), np.empty(n, float32), np.empty(n, float32), np.empty(n, float32)
    words = np.empty(TILE, uint32)
    while row < last:
        start = row * n
        if how[2] == float32(0.0):
            decode_span(E4M3, codes + start, scales + 2 * row * groups, n, x)
        else:
            _load(bf16[0], source, start, x)
            for column in range(0, n, TILE):
                if how[1]:
                    plain_words(start + column, keys[0], keys[1], words)
                count = min(TILE, n - column)
                of = scales + 2 * (row * groups + column // GROUP)
                encode_span(part(x, column, count), count, words, codes + start + column, of, how)
        _normalise(x, _inverse_rms(x, eps, terms, room), factor, rounded, y)
        store_floats(bf16[1], y, out, start, n)
        row += 1


@kernel
def _backward(each, last, rows, where, bf16, factor, eps, totals):
    """Parts of rows[1] rows; totals[i] becomes the sum of dy * x_hat over the i-th. where: addresses of dy, codes,
    scales, a gradient to add (0: none), dx; bf16: whether the first, the fourth and the last are."""
    dy, codes, scales, more, out = where
    n, size = len(factor), rows[1]
    groups = (n + GROUP - 1) // GROUP
    x, g, terms, room = np.empty(n, float32), np.empty(n, float32), np.empty(n, float32), np.empty(n, float32)
    dx = np.empty(n, float32)
    while each < last:
        total = totals[each]
        for row in range(each * size, min((each + 1) * size, rows[0])):
            start = row * n
            decode_span(E4M3, codes + start, scales + 2 * row * groups, n, x)
            _load(bf16[0], dy, start, g)
            inverse = _inverse_rms(x, eps, terms, room)
            _weighted(g, x, inverse, factor, terms)
            mean = _sum(terms, room) / float32(n)
            _gradients(g, x, inverse, mean, factor, dx, total)
            if more:
                _load(bf16[1], more, start, x)
                _add(dx, x)
            store_floats(bf16[2], dx, out, start, n)
        each += 1


def _factor(weight: Tensor, plus_one: bool) -> np.ndarray:
    weight = weight.detach().float()
    return (weight + 1.0 if plus_one else weight).contiguous().numpy()


def _is_bf16(*dtypes: torch.dtype) -> tuple[bool, ...]:
    return tuple(dtype == torch.bfloat16 for dtype in dtypes)


def rmsnorm(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, plus_one: bool, cast_first: bool, seed: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = x.contiguous()
    total = x.new_empty(0) if residual is None else x + residual.contiguous()
    source = x if residual is None else total
    codes, scales = GROUPS["e4m3"].empty(source)
    out = torch.empty(x.shape, dtype=out_dtype(x.dtype, weight.dtype, cast_first), device="cpu")
    bf16 = _is_bf16(x.dtype, out.dtype)
    where = source.data_ptr(), codes.data_ptr(), scales.data_ptr(), out.data_ptr()
    of = _factor(weight, plus_one), float32(eps), cast_first and bf16[0]
    how, keys = rule_of("e4m3", seed, x.dtype), words_of(*seed_keys(seed or 0))
    in_parts(lambda row, last: _forward(row, last, where, bf16, of, how, keys), x.shape[0], values=x.shape[1])
    return out, codes, scales, total


def rmsnorm_again(
    codes: Tensor, scales: Tensor, weight: Tensor, eps: float, plus_one: bool, cast_first: bool, dtype: torch.dtype
) -> Tensor:
    codes, scales = codes.contiguous(), scales.contiguous()
    out = torch.empty(codes.shape, dtype=out_dtype(dtype, weight.dtype, cast_first), device="cpu")
    bf16 = _is_bf16(dtype, out.dtype)
    where = 0, codes.data_ptr(), scales.data_ptr(), out.data_ptr()
    of = _factor(weight, plus_one), float32(eps), cast_first and bf16[0]
    how, keys = (E4M3, False, float32(0.0)), words_of(0, 0)
    rows, values = codes.shape
    in_parts(lambda row, last: _forward(row, last, where, bf16, of, how, keys), rows, values=values)
    return out


def rmsnorm_backward(
    dy: Tensor,
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    d_total: Tensor | None,
    eps: float,
    plus_one: bool,
    dtype: torch.dtype,
    weight_wanted: bool,
) -> tuple[Tensor, Tensor]:
    dy, codes, scales = dy.contiguous(), codes.contiguous(), scales.contiguous()
    more = dy if d_total is None else d_total.contiguous()
    out = torch.empty(codes.shape, dtype=dtype, device="cpu")
    rows, n = codes.shape
    count, each = parts_of(rows)
    totals = torch.zeros(count, n)
    where = (
        dy.data_ptr(),
        codes.data_ptr(),
        scales.data_ptr(),
        0 if d_total is None else more.data_ptr(),
        out.data_ptr(),
    )
    of = _is_bf16(dy.dtype, more.dtype, dtype), _factor(weight, plus_one), float32(eps), totals.numpy()
    in_parts(lambda first, last: _backward(first, last, (rows, each), where, *of), count, values=each * n)
    return out, sum_pairs(totals, 0).to(weight.dtype) if weight_wanted else weight.new_empty(0)
