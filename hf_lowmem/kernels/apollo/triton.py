"""APOLLO in Triton: three small kernels for its factors, one for the step, on tiles of rows and columns.

Nothing of the gradient's size is made: it is read once for the norm of its rescaled self and once for the step, where
torch writes it four times in fp32. The norm is summed in a fixed order, by the same programs in the same way each time:
first each program's part, then the parts, so a run can be repeated bit for bit.
"""

# A jit function is called with launch options, and with plain numbers where it declares constants.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowmem.kernels._device import div, fma, load_fp32, paired_word, sqrt
from hf_lowmem.kernels.adamw.reference import corrected_lr
from hf_lowmem.kernels.apollo import reference
from hf_lowmem.kernels.exact import seed_keys
from hf_lowmem.kernels.step.triton import KEEP, load_weight, save_weight
from hf_lowmem.specs import WEIGHT_STORES

ROWS: tl.constexpr = tl.constexpr(8)
COLUMNS: tl.constexpr = tl.constexpr(128)
PARTS = 512  # of a matrix's norm, at most
NUM_WARPS = 4

TINY: tl.constexpr = tl.constexpr(reference.TINY)
GROWTH_LIMIT: tl.constexpr = tl.constexpr(reference.GROWTH_LIMIT)


@triton.jit
def scale_kernel(
    direction,
    projected,
    out,
    channels,
    width,
    channel_stride,
    width_stride,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """s of CHANNELS channels of one matrix: ||N_j|| / (||R_j|| + 1e-8), over `width` values each."""
    batch = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    base = batch * channels * width + channel.to(tl.int64)[:, None] * channel_stride
    above = tl.zeros((CHANNELS, WIDTH), tl.float32)
    below = tl.zeros((CHANNELS, WIDTH), tl.float32)
    start = 0  # a range of numbers is beyond the interpreter of triton 3.6
    while start < width:
        place = start + tl.arange(0, WIDTH)
        mask = (channel < channels)[:, None] & (place < width)[None, :]
        offset = base + place.to(tl.int64)[None, :] * width_stride
        n = tl.load(direction + offset, mask=mask, other=0.0)
        r = tl.load(projected + offset, mask=mask, other=0.0)
        above += n * n
        below += r * r
        start += WIDTH
    s = div(sqrt(tl.sum(above, axis=1)), sqrt(tl.sum(below, axis=1)) + TINY)
    tl.store(out + batch * channels + channel, s, mask=channel < channels)


@triton.jit
def _scales(s_ptr, batch, row, column, m, n, BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr):
    """s beside a tile: (ROWS, 1), (1, COLUMNS), or one number for all."""
    if BY_ROW:
        s = tl.load(s_ptr + batch * m + row, mask=row < m, other=0.0)[:, None]
    elif BY_COLUMN:
        s = tl.load(s_ptr + batch * n + column, mask=column < n, other=0.0)[None, :]
    else:
        s = tl.load(s_ptr + batch)
    return s


@triton.jit
def norm_kernel(grad, s_ptr, parts, m, n, tiles, BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr):
    """Sum of the squares of grad * s over every num_programs(0)-th tile of one matrix."""
    batch = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(n, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    tile = tl.program_id(0)
    while tile < tiles:
        row = tile // across * ROWS + tl.arange(0, ROWS)
        column = tile % across * COLUMNS + tl.arange(0, COLUMNS)
        mask = (row < m)[:, None] & (column < n)[None, :]
        offset = (batch * m + row.to(tl.int64))[:, None] * n + column[None, :]
        x = load_fp32(grad + offset, mask) * _scales(s_ptr, batch, row, column, m, n, BY_ROW, BY_COLUMN)
        total += x * x
        tile += tl.num_programs(0)
    tl.store(parts + batch * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.sum(total, axis=1), axis=0))


@triton.jit
def growth_kernel(parts, prev_norm, factor_ptr, count, COUNT: tl.constexpr):
    """`growth_` of one matrix, whose norm is the root of the sum of `count` parts. COUNT: the next power of two."""
    batch = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, COUNT)
    norm = sqrt(tl.sum(tl.load(parts + batch * count + place, mask=place < count, other=0.0), axis=0))
    before = tl.load(prev_norm + batch)
    factor = div(tl.maximum(div(norm, before + TINY), GROWTH_LIMIT), GROWTH_LIMIT)
    factor = tl.where(before > 0, factor, 1.0)
    tl.store(prev_norm + batch, div(norm, factor))
    tl.store(factor_ptr + batch, factor)


@triton.jit(do_not_specialize=["k0", "k1"])
def apollo_kernel(
    param, grad, correction, finite_ptr, s_ptr, factor_ptr, m, n, root, step, decay, k0, k1,
    BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """One tile of one matrix: w -= ... as in reference.apollo_step, whose operations are these one by one."""
    if tl.load(finite_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)) != 0:
        batch = tl.program_id(1).to(tl.int64)
        across = tl.cdiv(n, COLUMNS)
        row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
        column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
        mask = (row < m)[:, None] & (column < n)[None, :]
        offset = (batch * m + row.to(tl.int64))[:, None] * n + column[None, :]
        s = _scales(s_ptr, batch, row, column, m, n, BY_ROW, BY_COLUMN)
        update = div(load_fp32(grad + offset, mask) * s, tl.load(factor_ptr + batch)) * root
        w = load_weight(param + offset, correction + offset, mask, STORE)
        w = fma(update, step, w)
        w = fma(w, decay, w)
        if STORE == KEEP:
            save_weight(param + offset, correction + offset, w, offset, mask, STORE)
        else:
            save_weight(param + offset, correction + offset, w, paired_word(offset, 0, k0, k1), mask, STORE)


def _axes(shape: torch.Size, per_channel: bool) -> dict[str, Any]:
    right = reference.channel_dim(shape) == -1
    return {"BY_ROW": per_channel and right, "BY_COLUMN": per_channel and not right}


def apollo_factors(
    grad: Tensor, projected: Tensor, direction: Tensor, prev_norm: Tensor, per_channel: bool
) -> tuple[Tensor, Tensor]:
    s, factor = reference.apollo_factors_fake(grad, projected, direction, prev_norm, per_channel)
    m, n = grad.shape[-2:]
    batch = grad.shape[:-2].numel()
    projected, direction, grad = projected.contiguous(), direction.contiguous(), grad.contiguous()
    options: dict[str, Any] = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
    channels = max(m, n) if per_channel else 1
    width = projected.shape[-2:].numel() // channels
    by_row = reference.channel_dim(grad.shape) == -1 or not per_channel
    strides = (width, 1) if by_row else (1, channels)
    block = {"CHANNELS": 32, "WIDTH": 32} if per_channel else {"CHANNELS": 1, "WIDTH": 1024}
    scale_kernel[(triton.cdiv(channels, block["CHANNELS"]), batch)](
        direction, projected, s, channels, width, *strides, **block, **options
    )
    tiles = triton.cdiv(m, ROWS.value) * triton.cdiv(n, COLUMNS.value)
    count = min(tiles, PARTS)
    parts = torch.empty(batch * count, dtype=torch.float32, device=grad.device)
    norm_kernel[(count, batch)](grad, s, parts, m, n, tiles, **_axes(grad.shape, per_channel), **options)
    growth_kernel[(batch,)](parts, prev_norm, factor, count, COUNT=triton.next_power_of_2(count), **options)
    return s, factor


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
    m, n = param.shape[-2:]
    store = "bf16_ecc" if correction is not None else "keep" if seed is None else "bf16_sr"
    per_channel = s.shape[-2:].numel() > 1
    tiles = triton.cdiv(m, ROWS.value) * triton.cdiv(n, COLUMNS.value)
    apollo_kernel[(tiles, param.shape[:-2].numel())](
        param, grad, param if correction is None else correction, finite, s, factor, m, n,
        math.sqrt(scale), -corrected_lr(lr, (beta1, beta2), step), -lr * weight_decay, *seed_keys(seed or 0),
        **_axes(param.shape, per_channel), STORE=WEIGHT_STORES.index(store),
        num_warps=NUM_WARPS, enable_fp_fusion=False,
    )  # fmt: skip


def compile_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    """Kernels to compile ahead: a 4096 × 14336 matrix, its transpose, Mini's single factor; bf16 weights, gradients."""
    cases: list[tuple[str, Any, dict[str, str], dict[str, Any], int]] = []
    sizes = {"m": "i32:16", "n": "i32:16"}
    for label, by_row, by_column in (("rows", True, False), ("columns", False, True), ("matrix", False, False)):
        axes: dict[str, Any] = {"BY_ROW": by_row, "BY_COLUMN": by_column}
        block: dict[str, Any] = {"CHANNELS": 1, "WIDTH": 1024} if label == "matrix" else {"CHANNELS": 32, "WIDTH": 32}
        # A launch makes constants of strides that are 1.
        strides: dict[str, str] = {"columns": {"width_stride": "i32:16"}}.get(label, {"channel_stride": "i32:16"})
        one: dict[str, Any] = {"channel_stride" if label == "columns" else "width_stride": 1}
        norms = {"direction": "*fp32", "projected": "*fp32", "out": "*fp32", "channels": "i32", "width": "i32:16"}
        cases.append((f"scale of {label}", scale_kernel, norms | strides, block | one, NUM_WARPS))
        reads = {"grad": "*bf16", "s_ptr": "*fp32", "parts": "*fp32"} | sizes | {"tiles": "i32:16"}
        cases.append((f"norm by {label}", norm_kernel, reads, axes, NUM_WARPS))
        for store in WEIGHT_STORES:
            weights = {"param": "*bf16", "grad": "*bf16", "correction": "*i8" if store == "bf16_ecc" else "*bf16"}
            factors = {"finite_ptr": "*i1", "s_ptr": "*fp32", "factor_ptr": "*fp32"}
            numbers = {"root": "fp32", "step": "fp32", "decay": "fp32", "k0": "i32", "k1": "i32"}
            constants = axes | {"STORE": WEIGHT_STORES.index(store)}
            signature = weights | factors | sizes | numbers
            cases.append((f"step by {label} {store}", apollo_kernel, signature, constants, NUM_WARPS))
    growth = {"parts": "*fp32", "prev_norm": "*fp32", "factor_ptr": "*fp32", "count": "i32:16"}
    return [*cases, ("growth", growth_kernel, growth, {"COUNT": PARTS}, NUM_WARPS)]
