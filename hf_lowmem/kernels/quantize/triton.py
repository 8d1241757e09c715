"""Group quantisation in one pass over memory: a program takes TILE groups, a row of its tile each.

A group lies within a warp (16 threads for 128 bf16 values, 4 for 32), so its largest value needs no shared memory.
Groups are counted through all rows; where the rows are contiguous and hold whole groups they are taken as one long row,
so the ragged case costs nothing elsewhere. No autotuning: the work is a copy, and any tile that fills a warp's loads
does it.
"""

# pyright: reportCallIssue=false
# Its idea of a kernel's parameters lacks those of the launch: num_warps, enable_fp_fusion.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowmem.kernels._device import as_bf16, load_fp32, store_rounded
from hf_lowmem.kernels._groups import e4m3_decode, int8_values, load_codes, quantize_groups
from hf_lowmem.kernels.exact import seed_keys
from hf_lowmem.kernels.quantize.reference import GROUPS, Groups

TILE_VALUES = 2048
WARPS = 4


@triton.jit(do_not_specialize=["k0", "k1"])
def quantize_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    last,  # values in a row
    stride,  # from one row of x to the next
    per_row,  # groups in a row
    n_groups,
    k0,
    k1,
    E4M3: tl.constexpr,
    TOP: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    FLAT: tl.constexpr,
):
    """FLAT: rows of whole groups, without a gap between them, and whole tiles of them."""
    group = tl.program_id(0) * TILE + tl.arange(0, TILE)
    if FLAT:
        row = tl.program_id(0).to(tl.int64) * (TILE * GROUP)
        column = tl.arange(0, TILE)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        index = row + column
        x = load_fp32(x_ptr + row + column, None)
    else:
        row = group // per_row
        column = ((group - row * per_row).to(tl.int64) * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
        row = row.to(tl.int64)[:, None]
        index = row * last + column
        x = load_fp32(x_ptr + row * stride + column, (group < n_groups)[:, None] & (column < last))  # (TILE, GROUP)
    codes, scale = quantize_groups(x, index, k0, k1, E4M3, TOP, LEAST, MOST, STOCHASTIC)
    tl.store(codes_ptr + index, codes, mask=None if FLAT else (group < n_groups)[:, None] & (column < last))
    tl.store(scales_ptr + group, as_bf16(scale), mask=None if FLAT else group < n_groups)


@triton.jit
def dequantize_kernel(
    codes_ptr,
    scales_ptr,
    out_ptr,
    last,
    per_row,
    n_groups,
    E4M3: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    FLAT: tl.constexpr,
):
    group = tl.program_id(0) * TILE + tl.arange(0, TILE)
    there = None if FLAT else group < n_groups
    if FLAT:
        inside = None
        row = tl.program_id(0).to(tl.int64) * (TILE * GROUP)
        index = row + (tl.arange(0, TILE)[:, None] * GROUP + tl.arange(0, GROUP)[None, :])
    else:
        row = group // per_row
        column = ((group - row * per_row).to(tl.int64) * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
        inside = (group < n_groups)[:, None] & (column < last)
        index = row.to(tl.int64)[:, None] * last + column
    codes = load_codes(codes_ptr + index, inside)
    scale = load_fp32(scales_ptr + group, there)
    if E4M3:
        value = e4m3_decode(codes) * scale[:, None]
    else:
        value = int8_values(codes) * scale[:, None]
    store_rounded(out_ptr + index, value, inside)


def tile(groups: Groups) -> int:
    """Groups in a program's tile."""
    return TILE_VALUES // groups.group


def is_flat(rows: Tensor, last: int, groups: Groups) -> bool:
    """Whether `rows_of` made one row of all, and whole tiles fill it."""
    return last == rows.numel() and last % (tile(groups) * groups.group) == 0


def rows_of(x: Tensor, groups: Groups) -> tuple[Tensor, int, int]:
    """x as something whose rows have one stride: (tensor, values in a row, stride). Copied only if it has to be."""
    last = x.shape[-1] if x.dim() else 1
    if x.is_contiguous() and last % groups.group == 0:
        return x, x.numel(), x.numel()
    if x.dim() > 1 and not x.is_contiguous():
        rows = x.reshape(-1, last)  # a view where strides allow it
        if rows.stride(1) == 1:
            return rows, last, rows.stride(0)
    return x.contiguous(), last, last


def quantize(x: Tensor, fmt: str, seed: int | None) -> tuple[Tensor, Tensor]:
    groups = GROUPS[fmt]
    codes, scales = groups.empty(x)
    if not x.numel():
        return codes, scales
    rows, last, stride = rows_of(x, groups)
    n_groups = scales.numel()
    quantize_kernel[(triton.cdiv(n_groups, tile(groups)),)](
        rows, codes, scales, last, stride, groups.groups(last), n_groups, *seed_keys(seed or 0),
        **quantize_constants(groups, x.dtype, seed is not None) | {"FLAT": is_flat(rows, last, groups)},
        num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return codes, scales


def dequantize(codes: Tensor, scales: Tensor, fmt: str, dtype: torch.dtype) -> Tensor:
    groups = GROUPS[fmt]
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if not codes.numel():
        return out
    codes, last, _ = rows_of(codes.contiguous(), groups)
    n_groups = scales.numel()
    dequantize_kernel[(triton.cdiv(n_groups, tile(groups)),)](
        codes, scales.contiguous(), out, last, groups.groups(last), n_groups,
        **dequantize_constants(groups) | {"FLAT": is_flat(codes, last, groups)},
        num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def quantize_constants(groups: Groups, dtype: torch.dtype, stochastic: bool) -> dict[str, Any]:
    return dequantize_constants(groups) | {
        "TOP": groups.top,
        "LEAST": groups.least,
        "MOST": groups.most(dtype),
        "STOCHASTIC": stochastic,
    }


def dequantize_constants(groups: Groups) -> dict[str, Any]:
    return {"E4M3": groups.name == "e4m3", "GROUP": groups.group, "TILE": tile(groups)}


def compile_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    """bf16 activations of an 8B model: every row is whole groups, so sizes and strides divide by 16."""
    cases = []
    sizes = {"last": "i32:16", "per_row": "i32:16", "n_groups": "i32:16"}
    for name, groups in GROUPS.items():
        stored = {"codes_ptr": "*u8" if groups.code_dtype is torch.uint8 else "*i8", "scales_ptr": "*bf16"}
        signature = {"x_ptr": "*bf16", **stored, **sizes, "stride": "i32:16", "k0": "i32", "k1": "i32"}
        for label, stochastic in ((f"quantize {name} bf16", False), (f"quantize {name} stochastic bf16", True)):
            constants = quantize_constants(groups, torch.bfloat16, stochastic) | {"FLAT": True}
            cases += [(label, quantize_kernel, signature, constants, WARPS)]
        signature = {**stored, "out_ptr": "*bf16", **sizes}
        constants = dequantize_constants(groups) | {"FLAT": True}
        cases += [(f"dequantize {name} bf16", dequantize_kernel, signature, constants, WARPS)]
    return cases
