"""act(gate) * up in one pass, with or without its saves, and its backward pass in one: a program takes TILE groups.

All of it is element-wise but for the largest value of a group of 128, which lies within a warp. Gate and up may be the
halves of one wider matrix: rows have a stride each.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowmem.kernels._device import (
    as_bf16,
    clip,
    div,
    exp,
    exp_short,
    load_fp32,
    reciprocal,
    round_as,
    store_rounded,
)
from hf_lowmem.kernels._groups import e4m3_decode, e4m3_groups, load_codes
from hf_lowmem.kernels.exact import seed_keys
from hf_lowmem.kernels.glu.reference import CUBIC, GELU_FLAT, SHORT_ENDS, SQRT_8_PI
from hf_lowmem.kernels.quantize.reference import GROUPS

E4M3 = GROUPS["e4m3"]
TILE = 8
WARPS = 4
LAUNCH: dict[str, Any] = {"num_warps": WARPS, "enable_fp_fusion": False}
ENDS = tl.constexpr(SHORT_ENDS)
BEYOND, LINEAR = tl.constexpr(GELU_FLAT), tl.constexpr(SQRT_8_PI)
CUBE, SLOPE = tl.constexpr(SQRT_8_PI * CUBIC), tl.constexpr(3 * SQRT_8_PI * CUBIC)


@triton.jit
def activate(x, GELU: tl.constexpr, SHORT: tl.constexpr):
    """act(x) and act'(x)."""
    if GELU:
        t = clip(x, BEYOND)
        square = t * t
        z = t * (square * CUBE + LINEAR)
        dz = square * SLOPE + LINEAR
    else:
        z = x
        dz = 1.0
    if SHORT:
        s = tl.where(z < -ENDS, 0.0, reciprocal(exp_short(z * -1.0) + 1.0))
        value = x * s
    else:
        denominator = exp(-z) + 1.0
        value = div(x, denominator)
        s = div(1.0, denominator)
    return value, s + value * (1.0 - s) * dz


@triton.jit
def place(row, column, stride, FLAT: tl.constexpr):
    """Places of a tile's values in a matrix whose rows have that stride; FLAT: `row` is the tile's first value."""
    return row + column if FLAT else row * stride + column


@triton.jit
def load_factor(ptr, scales_ptr, at, group, there, inside, SAVED: tl.constexpr):
    """Gate or up in fp32 (TILE, 128): decoded if SAVED, else widened."""
    if SAVED:
        codes = load_codes(ptr + at, inside)
        x = e4m3_decode(codes) * load_fp32(scales_ptr + group, there)[:, None]
    else:
        x = load_fp32(ptr + at, inside)
    return x


@triton.jit(do_not_specialize=["gate_k0", "gate_k1", "up_k0", "up_k1"])
def save_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    gate_codes_ptr,
    gate_scales_ptr,
    up_codes_ptr,
    up_scales_ptr,
    width,
    gate_stride,
    up_stride,
    per_row,  # groups in a row
    n_groups,
    gate_k0,
    gate_k1,
    up_k0,
    up_k1,
    GELU: tl.constexpr,
    SHORT: tl.constexpr,
    FLAT: tl.constexpr,
    MOST: tl.constexpr,
    GATE_STOCHASTIC: tl.constexpr,
    UP_STOCHASTIC: tl.constexpr,
    TILE: tl.constexpr,
):
    group = tl.program_id(0) * TILE + tl.arange(0, TILE)
    if FLAT:
        there, inside = None, None
        row = tl.program_id(0).to(tl.int64) * (TILE * 128)
        column = tl.arange(0, TILE)[:, None] * 128 + tl.arange(0, 128)[None, :]
    else:
        there = group < n_groups
        row = group // per_row
        column = ((group - row * per_row) * 128)[:, None] + tl.arange(0, 128)[None, :]
        row = row.to(tl.int64)[:, None]
        inside = there[:, None] & (column < width)
    index = place(row, column, width, FLAT)
    gate = load_fp32(gate_ptr + place(row, column, gate_stride, FLAT), inside)
    up = load_fp32(up_ptr + place(row, column, up_stride, FLAT), inside)
    value, _ = activate(gate, GELU, SHORT)
    store_rounded(out_ptr + index, round_as(out_ptr, value) * up, inside)
    codes, scale = e4m3_groups(gate, index, gate_k0, gate_k1, MOST, GATE_STOCHASTIC)
    tl.store(gate_codes_ptr + index, codes, mask=inside)
    tl.store(gate_scales_ptr + group, as_bf16(scale), mask=there)
    codes, scale = e4m3_groups(up, index, up_k0, up_k1, MOST, UP_STOCHASTIC)
    tl.store(up_codes_ptr + index, codes, mask=inside)
    tl.store(up_scales_ptr + group, as_bf16(scale), mask=there)


@triton.jit
def product_kernel(
    gate_ptr,
    up_ptr,
    gate_scales_ptr,
    up_scales_ptr,
    out_ptr,
    width,
    gate_stride,
    up_stride,
    per_row,
    n_groups,
    GELU: tl.constexpr,
    SHORT: tl.constexpr,
    FLAT: tl.constexpr,
    SAVED: tl.constexpr,
    TILE: tl.constexpr,
):
    group = tl.program_id(0) * TILE + tl.arange(0, TILE)
    if FLAT:
        there, inside = None, None
        row = tl.program_id(0).to(tl.int64) * (TILE * 128)
        column = tl.arange(0, TILE)[:, None] * 128 + tl.arange(0, 128)[None, :]
    else:
        there = group < n_groups
        row = group // per_row
        column = ((group - row * per_row) * 128)[:, None] + tl.arange(0, 128)[None, :]
        row = row.to(tl.int64)[:, None]
        inside = there[:, None] & (column < width)
    gate = load_factor(gate_ptr, gate_scales_ptr, place(row, column, gate_stride, FLAT), group, there, inside, SAVED)
    up = load_factor(up_ptr, up_scales_ptr, place(row, column, up_stride, FLAT), group, there, inside, SAVED)
    value, _ = activate(gate, GELU, SHORT)
    store_rounded(out_ptr + place(row, column, width, FLAT), round_as(out_ptr, value) * up, inside)


@triton.jit
def backward_kernel(
    grad_ptr,
    gate_ptr,
    up_ptr,
    gate_scales_ptr,
    up_scales_ptr,
    d_gate_ptr,
    d_up_ptr,
    width,
    grad_stride,
    gate_stride,
    up_stride,
    per_row,
    n_groups,
    GELU: tl.constexpr,
    SHORT: tl.constexpr,
    FLAT: tl.constexpr,
    SAVED: tl.constexpr,
    TILE: tl.constexpr,
):
    group = tl.program_id(0) * TILE + tl.arange(0, TILE)
    if FLAT:
        there, inside = None, None
        row = tl.program_id(0).to(tl.int64) * (TILE * 128)
        column = tl.arange(0, TILE)[:, None] * 128 + tl.arange(0, 128)[None, :]
    else:
        there = group < n_groups
        row = group // per_row
        column = ((group - row * per_row) * 128)[:, None] + tl.arange(0, 128)[None, :]
        row = row.to(tl.int64)[:, None]
        inside = there[:, None] & (column < width)
    grad = load_fp32(grad_ptr + place(row, column, grad_stride, FLAT), inside)
    gate = load_factor(gate_ptr, gate_scales_ptr, place(row, column, gate_stride, FLAT), group, there, inside, SAVED)
    up = load_factor(up_ptr, up_scales_ptr, place(row, column, up_stride, FLAT), group, there, inside, SAVED)
    value, slope = activate(gate, GELU, SHORT)
    index = place(row, column, width, FLAT)
    store_rounded(d_gate_ptr + index, grad * up * slope, inside)
    store_rounded(d_up_ptr + index, grad * value, inside)


def rows_of(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def grid(n_groups: int) -> tuple[int]:
    return (triton.cdiv(n_groups, TILE),)


def is_flat(*matrices: Tensor) -> bool:
    """Whether all are contiguous rows of whole groups, and whole tiles: nothing is masked, no row sought."""
    whole = matrices[0].numel() % (TILE * 128) == 0 and matrices[0].shape[1] % 128 == 0
    return whole and all(x.is_contiguous() for x in matrices)


def groups_of(x: Tensor) -> tuple[int, int]:
    """Groups in a row, and in all."""
    per_row = E4M3.groups(x.shape[1])
    return per_row, per_row * x.shape[0]


def glu_save(
    gate: Tensor, up: Tensor, act: str, gate_seed: int | None, up_seed: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    saved = (*E4M3.empty(gate), *E4M3.empty(up))
    if out.numel():
        gate, up = rows_of(gate), rows_of(up)
        per_row, n_groups = groups_of(gate)
        save_kernel[grid(n_groups)](
            gate, up, out, *saved, gate.shape[1], gate.stride(0), up.stride(0), per_row, n_groups,
            *seed_keys(gate_seed or 0), *seed_keys(up_seed or 0),
            **save_constants(act, gate.dtype, gate_seed is not None, up_seed is not None) | {"FLAT": is_flat(gate, up)},
            **LAUNCH,
        )  # fmt: skip
    return out, *saved


def save_constants(act: str, dtype: torch.dtype, gate_stochastic: bool, up_stochastic: bool) -> dict[str, Any]:
    return {
        "GELU": act == "gelu_tanh",
        "SHORT": dtype.itemsize == 2,
        "MOST": E4M3.most(dtype),
        "GATE_STOCHASTIC": gate_stochastic,
        "UP_STOCHASTIC": up_stochastic,
        "TILE": TILE,
    }


def glu(
    gate: Tensor, up: Tensor, gate_scales: Tensor | None, up_scales: Tensor | None, act: str, dtype: torch.dtype
) -> Tensor:
    out = torch.empty(gate.shape, dtype=dtype, device=gate.device)
    if out.numel():
        gate, up = rows_of(gate), rows_of(up)
        product_kernel[grid(groups_of(gate)[1])](
            gate, up, gate if gate_scales is None else gate_scales, up if up_scales is None else up_scales, out,
            gate.shape[1], gate.stride(0), up.stride(0), *groups_of(gate),
            **constants(act, gate_scales is not None, dtype) | {"FLAT": is_flat(gate, up)}, **LAUNCH,
        )  # fmt: skip
    return out


def constants(act: str, saved: bool, dtype: torch.dtype) -> dict[str, Any]:
    return {"GELU": act == "gelu_tanh", "SHORT": dtype.itemsize == 2, "SAVED": saved, "TILE": TILE}


def glu_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_scales: Tensor | None,
    up_scales: Tensor | None,
    act: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    d_gate, d_up = (torch.empty(gate.shape, dtype=dtype, device=gate.device) for _ in range(2))
    if d_gate.numel():
        grad, gate, up = rows_of(grad), rows_of(gate), rows_of(up)
        backward_kernel[grid(groups_of(gate)[1])](
            grad, gate, up, gate if gate_scales is None else gate_scales, up if up_scales is None else up_scales,
            d_gate, d_up, gate.shape[1], grad.stride(0), gate.stride(0), up.stride(0), *groups_of(gate),
            **constants(act, gate_scales is not None, dtype) | {"FLAT": is_flat(grad, gate, up)}, **LAUNCH,
        )  # fmt: skip
    return d_gate, d_up


def compile_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    """bf16, ffn 14336: gate and up of an 8B model."""
    sizes = {
        "width": "i32:16",
        "gate_stride": "i32:16",
        "up_stride": "i32:16",
        "per_row": "i32:16",
        "n_groups": "i32:16",
    }
    cases = []
    for act in ("silu", "gelu_tanh"):
        for stochastic in (False, True):
            saves = {
                "gate_codes_ptr": "*u8",
                "gate_scales_ptr": "*bf16",
                "up_codes_ptr": "*u8",
                "up_scales_ptr": "*bf16",
            }
            keys = dict.fromkeys(("gate_k0", "gate_k1", "up_k0", "up_k1"), "i32")
            cases.append((
                f"glu_save {act}{' stochastic' if stochastic else ''} bf16",
                save_kernel,
                {"gate_ptr": "*bf16", "up_ptr": "*bf16", "out_ptr": "*bf16", **saves, **sizes, **keys},
                save_constants(act, torch.bfloat16, stochastic, stochastic) | {"FLAT": True},
                WARPS,
            ))  # fmt: skip
        for saved in (False, True):
            factor = "*u8" if saved else "*bf16"
            factors = {"gate_ptr": factor, "up_ptr": factor, "gate_scales_ptr": "*bf16", "up_scales_ptr": "*bf16"}
            name = f"{act}{' saved' if saved else ''} bf16"
            signature = {**factors, "out_ptr": "*bf16", **sizes}
            fixed = constants(act, saved, torch.bfloat16) | {"FLAT": True}
            cases.append((f"glu {name}", product_kernel, signature, fixed, WARPS))
            pointers = {"grad_ptr": "*bf16", **factors, "d_gate_ptr": "*bf16", "d_up_ptr": "*bf16"}
            signature = {**pointers, "width": "i32:16", "grad_stride": "i32:16", **sizes}
            cases.append((f"glu_backward {name}", backward_kernel, signature, fixed, WARPS))
    return cases
