"""RMSNorm in one pass: a program holds a row, so its sum of squares, its codes and its output cost one reading.

Backward is one pass as well: the row is decoded, its root found again, and dx written; the weight's gradient gathers
in registers over the rows of a part and is written once for each part. A second, small kernel adds up the parts: two
stages and no atomics, so that the sum has one order.

No autotuning: a row decides its tile, and the order of the sums must not depend on a measurement.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowmem.kernels._device import (
    as_bf16,
    div,
    load_fp32,
    round_as,
    sqrt,
    store_rounded,
    sum_pairs,
    sum_row_pairs,
)
from hf_lowmem.kernels._groups import e4m3_decode, e4m3_groups, load_codes
from hf_lowmem.kernels.exact import seed_keys
from hf_lowmem.kernels.quantize.reference import GROUPS
from hf_lowmem.kernels.rmsnorm.reference import PARTS, out_dtype, parts_of

E4M3 = GROUPS["e4m3"]
# Of the second stage, a program of which takes so many columns: 128 bytes a row.
SECOND: dict[str, Any] = {"PARTS": PARTS, "LOG2": (PARTS - 1).bit_length(), "COLUMNS": 32}


@triton.jit
def inverse_rms(x, n, eps, GROUPS: tl.constexpr, LOG2: tl.constexpr):
    """1 / sqrt(mean(x**2) + eps) of the row x (groups, 128), whose padding is zero."""
    square = sum_pairs(tl.reshape(x * x, (GROUPS * 128,)), LOG2)
    return div(1.0, sqrt(div(square, n * 1.0) + eps))


@triton.jit
def load_saved(codes_ptr, scales_ptr, row, n, per_row, column, group, inside, EVEN: tl.constexpr):
    """A saved row, decoded: (groups, 128)."""
    codes = load_codes(codes_ptr + row * n + column, inside)
    scale = load_fp32(scales_ptr + row * per_row + group, None if EVEN else group < per_row)
    return e4m3_decode(codes) * scale[:, None]


@triton.jit
def load_weight(weight_ptr, column, inside, PLUS_ONE: tl.constexpr):
    weight = load_fp32(weight_ptr + column, inside)
    if PLUS_ONE:
        weight = weight + 1.0
    return weight


@triton.jit(do_not_specialize=["k0", "k1"])
def forward_kernel(
    x_ptr,
    weight_ptr,
    residual_ptr,
    y_ptr,
    codes_ptr,
    scales_ptr,
    total_ptr,
    n,
    per_row,  # groups in a row
    x_stride,
    residual_stride,
    eps,
    k0,
    k1,
    GROUPS: tl.constexpr,
    LOG2: tl.constexpr,
    EVEN: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    MOST: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = None if EVEN else column < n
    index = row * n + column
    x = load_fp32(x_ptr + row * x_stride + column, inside)
    if RESIDUAL:
        x = round_as(total_ptr, x + load_fp32(residual_ptr + row * residual_stride + column, inside))
        store_rounded(total_ptr + index, x, inside)

    codes, scale = e4m3_groups(x, index, k0, k1, MOST, STOCHASTIC)
    tl.store(codes_ptr + index, codes, mask=inside)
    tl.store(scales_ptr + row * per_row + group, as_bf16(scale), mask=None if EVEN else group < per_row)

    x_hat = x * inverse_rms(x, n, eps, GROUPS, LOG2)
    if CAST_FIRST:
        x_hat = round_as(x_ptr, x_hat)
    store_rounded(y_ptr + index, x_hat * load_weight(weight_ptr, column, inside, PLUS_ONE), inside)


@triton.jit
def again_kernel(
    codes_ptr,
    scales_ptr,
    weight_ptr,
    like_ptr,  # of the input's dtype; never read
    y_ptr,
    n,
    per_row,
    eps,
    GROUPS: tl.constexpr,
    LOG2: tl.constexpr,
    EVEN: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    CAST_FIRST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = None if EVEN else column < n
    x = load_saved(codes_ptr, scales_ptr, row, n, per_row, column, group, inside, EVEN)
    x_hat = x * inverse_rms(x, n, eps, GROUPS, LOG2)
    if CAST_FIRST:
        x_hat = round_as(like_ptr, x_hat)
    store_rounded(y_ptr + row * n + column, x_hat * load_weight(weight_ptr, column, inside, PLUS_ONE), inside)


@triton.jit
def backward_kernel(
    dy_ptr,
    codes_ptr,
    scales_ptr,
    weight_ptr,
    d_total_ptr,
    dx_ptr,
    parts_ptr,
    rows,
    each,  # rows in a part
    n,
    per_row,
    dy_stride,
    d_total_stride,
    eps,
    GROUPS: tl.constexpr,
    LOG2: tl.constexpr,
    EVEN: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    TOTAL: tl.constexpr,
    WEIGHT: tl.constexpr,
):
    part = tl.program_id(0)
    group = tl.arange(0, GROUPS)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = None if EVEN else column < n
    gathered = tl.zeros((GROUPS, 128), tl.float32)
    at = part * each
    stop = tl.minimum(at + each, rows)
    while at < stop:  # `range` of a value is beyond Triton 3.6's interpreter
        row = at.to(tl.int64)
        dy = load_fp32(dy_ptr + row * dy_stride + column, inside)
        x = load_saved(codes_ptr, scales_ptr, row, n, per_row, column, group, inside, EVEN)
        r = inverse_rms(x, n, eps, GROUPS, LOG2)
        x_hat = x * r
        g = dy * load_weight(weight_ptr, column, inside, PLUS_ONE)
        mean = div(sum_pairs(tl.reshape(g * x_hat, (GROUPS * 128,)), LOG2), n * 1.0)
        dx = (g - x_hat * mean) * r
        if TOTAL:
            dx = dx + load_fp32(d_total_ptr + row * d_total_stride + column, inside)
        store_rounded(dx_ptr + row * n + column, dx, inside)
        if WEIGHT:
            gathered = gathered + dy * x_hat
        at += 1
    if WEIGHT:
        tl.store(parts_ptr + part.to(tl.int64) * n + column, gathered, mask=inside)


@triton.jit
def sum_parts_kernel(parts_ptr, out_ptr, count, n, PARTS: tl.constexpr, LOG2: tl.constexpr, COLUMNS: tl.constexpr):
    part = tl.arange(0, PARTS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (part < count) & (column < n)[None, :]
    x = tl.load(parts_ptr + part.to(tl.int64) * n + column[None, :], mask=inside, other=0.0)
    store_rounded(out_ptr + column, sum_row_pairs(x, LOG2, COLUMNS), column < n)


def tile(n: int) -> dict[str, Any]:
    """Constants of a kernel for rows of n values: a power of two of groups. EVEN: n fills them, nothing is masked."""
    log2 = max((n - 1).bit_length(), 7)
    return {"GROUPS": 1 << (log2 - 7), "LOG2": log2, "EVEN": n == 1 << log2}


def warps_of(n: int) -> int:
    """16 values a thread, at least a warp, at most 16 of them."""
    return min(max(tile(n)["GROUPS"] // 4, 1), 16)


def flags(**given: bool) -> dict[str, Any]:
    return given


def launch(warps: int) -> dict[str, Any]:
    return {"num_warps": warps, "enable_fp_fusion": False}


def rows_of(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def rmsnorm(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, plus_one: bool, cast_first: bool, seed: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, n = x.shape
    y = torch.empty((rows, n), dtype=out_dtype(x.dtype, weight.dtype, cast_first), device=x.device)
    codes, scales = E4M3.empty(x)
    total = x.new_empty(0) if residual is None else torch.empty_like(y, dtype=x.dtype)
    if not x.numel():
        return y, codes, scales, total
    x = rows_of(x)
    other = x if residual is None else rows_of(residual)
    forward_kernel[(rows,)](
        x, weight.contiguous(), other, y, codes, scales, x if residual is None else total,
        n, scales.shape[1], x.stride(0), other.stride(0), eps, *seed_keys(seed or 0),
        **forward_constants(n, x.dtype, residual is not None, plus_one, cast_first, seed is not None),
        **launch(warps_of(n)),
    )  # fmt: skip
    return y, codes, scales, total


def forward_constants(
    n: int, dtype: torch.dtype, residual: bool, plus_one: bool, cast_first: bool, stochastic: bool
) -> dict[str, Any]:
    return {
        **tile(n),
        "RESIDUAL": residual,
        "PLUS_ONE": plus_one,
        "CAST_FIRST": cast_first,
        "MOST": E4M3.most(dtype),
        "STOCHASTIC": stochastic,
    }


def rmsnorm_again(
    codes: Tensor, scales: Tensor, weight: Tensor, eps: float, plus_one: bool, cast_first: bool, dtype: torch.dtype
) -> Tensor:
    rows, n = codes.shape
    y = torch.empty((rows, n), dtype=out_dtype(dtype, weight.dtype, cast_first), device=codes.device)
    if y.numel():
        again_kernel[(rows,)](
            codes, scales, weight.contiguous(), codes.new_empty(0, dtype=dtype), y, n, scales.shape[1], eps,
            **tile(n), **flags(PLUS_ONE=plus_one, CAST_FIRST=cast_first), **launch(warps_of(n)),
        )  # fmt: skip
    return y


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
    rows, n = codes.shape
    dx = torch.empty((rows, n), dtype=dtype, device=codes.device)
    dw = torch.zeros_like(weight) if weight_wanted else weight.new_empty(0)
    if not dx.numel():
        return dx, dw
    count, each = parts_of(rows)
    parts = torch.empty((count, n), dtype=torch.float32, device=codes.device) if weight_wanted else dx
    dy = rows_of(dy)
    other = dy if d_total is None else rows_of(d_total)
    backward_kernel[(count,)](
        dy, codes, scales, weight.contiguous(), other, dx, parts,
        rows, each, n, scales.shape[1], dy.stride(0), other.stride(0), eps,
        **tile(n), **flags(PLUS_ONE=plus_one, TOTAL=d_total is not None, WEIGHT=weight_wanted), **launch(warps_of(n)),
    )  # fmt: skip
    if weight_wanted:
        sum_parts_kernel[(triton.cdiv(n, SECOND["COLUMNS"]),)](parts, dw, count, n, **SECOND, **launch(4))
    return dx, dw


def compile_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    """bf16, hidden 4096: a row of an 8B model."""
    n, bf16 = 4096, torch.bfloat16
    saved = {"codes_ptr": "*u8", "scales_ptr": "*bf16"}
    sizes = {"n": "i32:16", "per_row": "i32:16"}
    cases = []
    for residual, plus_one, stochastic in ((False, False, False), (True, True, True)):
        name = " residual 1+w stochastic" if residual else ""
        signature = {"x_ptr": "*bf16", "weight_ptr": "*bf16", "residual_ptr": "*bf16", "y_ptr": "*bf16", **saved}
        signature |= {"total_ptr": "*bf16", **sizes, "x_stride": "i32:16", "residual_stride": "i32:16", "eps": "fp32"}
        constants = forward_constants(n, bf16, residual, plus_one, not plus_one, stochastic)
        cases.append((f"rmsnorm{name} bf16", forward_kernel, signature | {"k0": "i32", "k1": "i32"}, constants, 8))
    same = {"weight_ptr": "*bf16"}
    constants = {**tile(n), "PLUS_ONE": False, "CAST_FIRST": True}
    again = {**saved, **same, "like_ptr": "*bf16", "y_ptr": "*bf16", **sizes, "eps": "fp32"}
    cases.append(("rmsnorm_again bf16", again_kernel, again, constants, warps_of(n)))
    backward = {"dy_ptr": "*bf16", **saved, **same, "d_total_ptr": "*bf16", "dx_ptr": "*bf16", "parts_ptr": "*fp32"}
    backward |= {
        "rows": "i32",
        "each": "i32",
        **sizes,
        "dy_stride": "i32:16",
        "d_total_stride": "i32:16",
        "eps": "fp32",
    }
    for total in (False, True):
        constants = {**tile(n), "PLUS_ONE": total, "TOTAL": total, "WEIGHT": True}
        label = f"rmsnorm_backward{' total 1+w' if total else ''} bf16"
        cases.append((label, backward_kernel, backward, constants, warps_of(n)))
    sums = {"parts_ptr": "*fp32", "out_ptr": "*bf16", "count": "i32", "n": "i32:16"}
    cases.append(("rmsnorm_backward parts", sum_parts_kernel, sums, SECOND, 4))
    return cases
