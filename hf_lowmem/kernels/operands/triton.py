"""Operands in one launch: a program takes the values that share scales, twice, a tile after the other.

First it finds the largest, then it encodes. The second read of 32 rows, or of 32 columns, comes from a cache for as
long as the rows of all programs that run at a time fit there. A tile is 32 x 64: its codes are written straight in
runs of 64 bytes and turned in runs of 32, a sector of memory, so no tile has to pass through shared memory by hand.
A matrix of 1,024 columns gives `columns_kernel` 32 programs, fewer than a large GPU has processors.
"""

from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowmem.kernels._device import div, from_bits, load_fp32, magnitude, reciprocal, round_bf16_up
from hf_lowmem.kernels._groups import e4m3_nearest, int8_nearest
from hf_lowmem.kernels.operands.reference import check_layout, empty_columns, empty_rows
from hf_lowmem.kernels.quantize.reference import GROUPS

ROWS = COLUMNS = 32  # that share a program
TILE = 64
WARPS = 4
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}
WITH_FACTOR: tl.constexpr = tl.constexpr(True)
Options = dict[str, tl.constexpr]  # as a kernel declares them; it is launched with plain numbers


@triton.jit
def scale_of(largest, TOP: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr):
    """Bits of the largest magnitudes -> scales, and whether they are finite. Reference: `Groups.scale_of`."""
    finite = largest < 0x7F800000
    scale = div(from_bits(tl.where(finite, largest, 0).to(tl.uint32)), TOP)
    return round_bf16_up(tl.minimum(tl.maximum(scale, LEAST), MOST)), finite


@triton.jit
def encode(x, scale, finite, E4M3: tl.constexpr, TOP: tl.constexpr):
    """fp32 values, their scales and whether those are finite, all of shapes that fit -> codes."""
    y = tl.where(finite, x, 0.0) * reciprocal(scale)
    if E4M3:
        codes = e4m3_nearest(y)
    else:
        codes = int8_nearest(tl.minimum(tl.maximum(y, -TOP), TOP))
    return codes


@triton.jit
def load_tile(x_ptr, factor_ptr, row, column, m, k, row_stride, column_stride, factor_at, FACTOR: tl.constexpr):
    """Values (rows, columns), int64 indices, as fp32, times the factors at `factor_at`; zero outside of the matrix."""
    inside = (row < m) & (column < k)
    x = load_fp32(x_ptr + row * row_stride + column * column_stride, inside)
    if FACTOR:
        x = tl.where(inside, x * tl.load(factor_ptr + factor_at, mask=inside, other=0.0), 0.0)
    return x


@triton.jit
def rows_kernel(
    x_ptr,
    factor_ptr,
    largest_ptr,
    codes_ptr,
    turned_ptr,
    scales_ptr,
    m,
    k,
    row_stride,
    column_stride,
    width,  # of a row of turned codes
    E4M3: tl.constexpr,
    TOP: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    FACTOR: tl.constexpr,
    LARGEST: tl.constexpr,
    STRAIGHT: tl.constexpr,
    TURNED: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = rows[:, None]
    if LARGEST:
        largest = magnitude(tl.load(largest_ptr)) + tl.zeros((ROWS,), tl.int32)
    else:
        found = tl.zeros((ROWS, TILE), tl.int32)
        for start in range(0, k, TILE):
            column = (start + tl.arange(0, TILE)).to(tl.int64)[None, :]
            x = load_tile(x_ptr, factor_ptr, row, column, m, k, row_stride, column_stride, column, FACTOR)
            found = tl.maximum(found, magnitude(x))
        largest = tl.max(found, 1)
    scale, finite = scale_of(largest, TOP, LEAST, MOST)
    tl.store(scales_ptr + rows, tl.where(finite, scale, float("nan")), mask=rows < m)
    for start in range(0, k, TILE):
        column = (start + tl.arange(0, TILE)).to(tl.int64)[None, :]
        x = load_tile(x_ptr, factor_ptr, row, column, m, k, row_stride, column_stride, column, FACTOR)
        codes = encode(x, scale[:, None], finite[:, None], E4M3, TOP)
        if STRAIGHT:
            tl.store(codes_ptr + row * k + column, codes, mask=(row < m) & (column < k))
        if TURNED:  # rows beyond the last are zeros, and their codes too
            tl.store(turned_ptr + column * width + row, codes, mask=(row < width) & (column < k))


@triton.jit
def columns_kernel(
    x_ptr,
    factor_ptr,
    turned_ptr,
    scales_ptr,
    m,
    k,
    row_stride,
    column_stride,
    width,
    E4M3: tl.constexpr,
    TOP: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    columns = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    column = columns[None, :]
    found = tl.zeros((TILE, COLUMNS), tl.int32)
    for start in range(0, m, TILE):
        row = (start + tl.arange(0, TILE)).to(tl.int64)[:, None]
        x = load_tile(x_ptr, factor_ptr, row, column, m, k, row_stride, column_stride, row, WITH_FACTOR)
        found = tl.maximum(found, magnitude(x))
    scale, finite = scale_of(tl.max(found, 0), TOP, LEAST, MOST)
    tl.store(scales_ptr + columns, tl.where(finite, scale, float("nan")), mask=columns < k)
    for start in range(0, width, TILE):
        row = (start + tl.arange(0, TILE)).to(tl.int64)[:, None]
        x = load_tile(x_ptr, factor_ptr, row, column, m, k, row_stride, column_stride, row, WITH_FACTOR)
        codes = encode(x, scale[None, :], finite[None, :], E4M3, TOP)
        tl.store(turned_ptr + column * width + row, codes, mask=(row < width) & (column < k))


def code_rows(
    x: Tensor, factor: Tensor | None, largest: Tensor | None, fmt: str, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    codes, turned, scales = empty_rows(x, fmt, layout)
    m, k = x.shape
    if m:
        flags = {"FACTOR": factor is not None, "LARGEST": largest is not None}
        dtype = x.dtype if factor is None else torch.float32
        flags |= {"STRAIGHT": layout != "turned", "TURNED": layout != "rows"}
        pointers = x, x if factor is None else factor, x if largest is None else largest, codes, turned, scales
        sizes = m, k, x.stride(0), x.stride(1), turned.shape[1]
        grid, options = (triton.cdiv(m, ROWS),), constants(fmt, dtype) | flags | {"ROWS": ROWS, "TILE": TILE} | OPTIONS
        rows_kernel[grid](*pointers, *sizes, **cast(Options, options))
    return codes, turned, scales


def code_columns(x: Tensor, factor: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    turned, scales = empty_columns(x, fmt)
    m, k = x.shape
    if k:
        sizes = m, k, x.stride(0), x.stride(1), turned.shape[1]
        options = constants(fmt, torch.float32) | {"COLUMNS": COLUMNS, "TILE": TILE} | OPTIONS
        grid = (triton.cdiv(k, COLUMNS),)
        columns_kernel[grid](x, factor, turned, scales, *sizes, **cast(Options, options))
    return turned, scales


def product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, fast: bool, dtype: torch.dtype) -> Tensor:
    """The device library's own product of codes: torch calls cuBLAS or CUTLASS."""
    check_layout(a, b)
    rows, columns = a_scale.view(-1, 1), b_scale.view(1, -1)
    if a.dtype == torch.int8:
        return (torch._int_mm(a, b.t()).to(torch.float32) * rows * columns).to(dtype)
    a, b = (t.view(torch.float8_e4m3fn) for t in (a, b))
    if rows.numel() == columns.numel() == 1 and a.shape[0] > 1:
        rows, columns = rows.view(()), columns.view(())
    made = torch._scaled_mm(a, b.t(), rows, columns, out_dtype=torch.bfloat16, use_fast_accum=fast)
    return made.to(dtype)


def constants(fmt: str, dtype: torch.dtype) -> dict[str, object]:
    groups = GROUPS[fmt]
    return {"E4M3": fmt == "e4m3", "TOP": groups.top, "LEAST": groups.least, "MOST": groups.most(dtype)}


def compile_cases() -> list[tuple[str, object, dict[str, str], dict[str, object], int]]:
    """bf16 operands of an 8B model: x of the forward pass, a weight and x of the backward pass, g with either fold."""
    cases = []
    sizes = {"m": "i32:16", "k": "i32:16", "row_stride": "i32:16", "column_stride": "i32", "width": "i32:16"}
    for fmt in GROUPS:
        code = "*u8" if fmt == "e4m3" else "*i8"
        pointers = {"x_ptr": "*bf16", "factor_ptr": "*fp32", "turned_ptr": code, "scales_ptr": "*fp32"}
        signature = pointers | {"largest_ptr": "*fp32", "codes_ptr": code} | sizes
        tile = {"ROWS": ROWS, "TILE": TILE}
        for label, factor, largest, straight, turned in (
            ("rows", False, False, True, False),
            ("rows turned", False, False, False, True),
            ("rows folded", True, False, True, False),
            ("rows of one scale, both", False, True, True, True),
        ):
            dtype = torch.float32 if factor else torch.bfloat16
            flags = {"FACTOR": factor, "LARGEST": largest, "STRAIGHT": straight, "TURNED": turned}
            cases += [(f"{label} {fmt} bf16", rows_kernel, signature, constants(fmt, dtype) | flags | tile, WARPS)]
        tile = {"COLUMNS": COLUMNS, "TILE": TILE}
        label = f"columns folded {fmt} bf16"
        cases += [(label, columns_kernel, pointers | sizes, constants(fmt, torch.float32) | tile, WARPS)]
    return cases
