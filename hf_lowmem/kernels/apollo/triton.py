"""APOLLO in Triton: three kernels for its factors, one for the step, on tiles of rows and columns.

Each is one launch for all matrices of a call, which are of one shape: a table in device memory has their addresses.
Nothing of the gradient's size is made: it is read once for the norm of its rescaled self and once for the step, where
torch writes it four times in fp32. The norm is summed in a fixed order, by the same programs in the same way each time:
first each program's part, then the parts, so a run can be repeated bit for bit, in whatever company a matrix is.
"""

# A jit function is called with launch options, and with plain numbers where it declares constants.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowmem.kernels._device import (
    FACTOR,
    FACTOR_STEP,
    GROUP,
    div,
    fma,
    from_bits,
    grouped_word,
    load_fp32,
    magnitude,
    random_word,
    rotate_half,
    sqrt,
)
from hf_lowmem.kernels.adamw.reference import corrected_lr
from hf_lowmem.kernels.apollo import reference
from hf_lowmem.kernels.exact import all_seed_keys
from hf_lowmem.kernels.step.launch import fp32_bits, parts_of, table_on
from hf_lowmem.kernels.step.triton import INFINITY, KEEP, LIMIT, dtype_of, load_weight, row_address, save_weight
from hf_lowmem.specs import WEIGHT_STORES

ROWS: tl.constexpr = tl.constexpr(8)
COLUMNS: tl.constexpr = tl.constexpr(128)
PARTS = 512  # of a matrix's norm, at most
NUM_WARPS = 4

TINY: tl.constexpr = tl.constexpr(reference.TINY)
GROWTH_LIMIT: tl.constexpr = tl.constexpr(reference.GROWTH_LIMIT)

# Columns of the tables: gradient, last norm; and weight, gradient, correction, last norm, two keys, the step's fp32.
_FACTOR_COLUMNS: tl.constexpr = tl.constexpr(2)
_STEP_COLUMNS: tl.constexpr = tl.constexpr(7)
_KEYS: tl.constexpr = tl.constexpr(4)
_STEP: tl.constexpr = tl.constexpr(6)


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
    start = tl.full([], 0, tl.int64)  # a range of numbers is beyond the interpreter of triton 3.6
    while start < width:
        place = start + tl.arange(0, WIDTH)
        mask = (channel < channels)[:, None] & (place < width)[None, :]
        offset = base + place[None, :] * width_stride
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
def norm_kernel(
    table,
    finite_ptr,
    s_ptr,
    parts,
    m,
    n,
    tiles,
    each,
    GRADIENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BY_ROW: tl.constexpr,
    BY_COLUMN: tl.constexpr,
):
    """Sum of the squares of grad * s over every num_programs(0)-th tile of one matrix; a bad value clears the flag.

    Program (j, b): of matrix b of all, which is one of the `each` of a parameter.
    """
    b = tl.program_id(1)
    batch = b.to(tl.int64)
    i = b // each
    row_of_table = table + i * _FACTOR_COLUMNS
    grad = row_address(row_of_table, 0, GRADIENT, ALIGNED) + (b % each).to(tl.int64) * m * n
    across = tl.cdiv(n, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    worst = tl.zeros((ROWS, COLUMNS), tl.int32)
    tile = tl.program_id(0)
    while tile < tiles:
        row = tile // across * ROWS + tl.arange(0, ROWS)
        column = tile % across * COLUMNS + tl.arange(0, COLUMNS)
        mask = (row < m)[:, None] & (column < n)[None, :]
        offset = row.to(tl.int64)[:, None] * n + column[None, :]
        g = load_fp32(grad + offset, mask)
        worst = tl.maximum(worst, magnitude(g))
        x = g * _scales(s_ptr, batch, row, column, m, n, BY_ROW, BY_COLUMN)
        total += x * x
        tile += tl.num_programs(0)
    tl.store(parts + batch * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.sum(total, axis=1), axis=0))
    if tl.max(tl.max(worst, axis=1), axis=0) >= LIMIT:
        tl.store(finite_ptr + i, 0)


@triton.jit
def growth_kernel(table, finite_ptr, parts, factors, norms, count, each, reach, COUNT: tl.constexpr):
    """`growth_` of one matrix, whose norm is the root of the sum of `count` parts. COUNT: the next power of two."""
    b = tl.program_id(0)
    batch = b.to(tl.int64)
    place = tl.arange(0, COUNT)
    norm = sqrt(tl.sum(tl.load(parts + batch * count + place, mask=place < count, other=0.0), axis=0))
    before = tl.load(row_address(table + b // each * _FACTOR_COLUMNS, 1, tl.float32, False) + b % each)
    factor = div(tl.maximum(div(norm, before + TINY), GROWTH_LIMIT), GROWTH_LIMIT)
    factor = tl.where(before > 0, factor, 1.0)
    after = div(norm, factor)
    # A maximum may have dropped a nan, but not the norm itself.
    fine = (magnitude(norm) < INFINITY) & (magnitude(factor) < INFINITY) & (magnitude(after * reach) < INFINITY)
    tl.store(factors + batch, tl.where(fine, factor, 1.0))
    tl.store(norms + batch, tl.where(fine, after, before))
    if not fine:
        tl.store(finite_ptr + b // each, 0)


@triton.jit
def _words(first, row, column, n, k0, k1, EVEN: tl.constexpr):
    """Random bits of a tile of the values from `first` on, that of these rows and the columns from `column` on.

    EVEN: rows, and what is before them, are whole groups, and of two neighbours' words one is the other's, rotated.
    """
    if EVEN:
        half = column // 2 + tl.arange(0, COLUMNS // 2)
        group = (first // GROUP).to(tl.uint32) + row.to(tl.uint32)[:, None] * (n // GROUP)  # modulo 2**32
        word = random_word(group + (half // (GROUP // 2)).to(tl.uint32)[None, :], k0, k1)
        word *= ((half % (GROUP // 2)).to(tl.uint32) * FACTOR_STEP + FACTOR)[None, :]
        words = tl.reshape(tl.join(word, rotate_half(word)), (ROWS, COLUMNS))
    else:
        place = column + tl.arange(0, COLUMNS)
        words = grouped_word(first + row.to(tl.int64)[:, None] * n + place[None, :], 0, k0, k1)
    return words


@triton.jit
def apollo_kernel(
    table, finite_ptr, skipped, s_ptr, factors, norms, m, n, each, root, decay,
    WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, ALIGNED: tl.constexpr,
    BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr, STORE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One tile of one matrix: w -= ... as in reference.apollo_step, whose operations are these one by one.

    EVEN: a row is whole groups of 32 values.
    """
    b = tl.program_id(1)
    i = b // each
    if tl.load(finite_ptr + i) != 0:
        batch = b.to(tl.int64)
        row_of_table = table + i * _STEP_COLUMNS
        first = (b % each).to(tl.int64) * m * n
        across = tl.cdiv(n, COLUMNS)
        row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
        column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
        mask = (row < m)[:, None] & (column < n)[None, :]
        offset = first + row.to(tl.int64)[:, None] * n + column[None, :]
        param = row_address(row_of_table, 0, WEIGHT, ALIGNED)
        correction = row_address(row_of_table, 2, tl.int8, ALIGNED)
        s = _scales(s_ptr, batch, row, column, m, n, BY_ROW, BY_COLUMN)
        g = load_fp32(row_address(row_of_table, 1, GRADIENT, ALIGNED) + offset, mask)
        update = div(g * s, tl.load(factors + batch)) * root
        w = load_weight(param + offset, correction + offset, mask, STORE)
        w = fma(update, from_bits(tl.load(row_of_table + _STEP).to(tl.uint32)), w)
        w = fma(w, decay, w)
        if STORE == KEEP:
            save_weight(param + offset, correction + offset, w, offset, mask, STORE)
        else:
            k0 = tl.load(row_of_table + _KEYS).to(tl.int32)
            k1 = tl.load(row_of_table + _KEYS + 1).to(tl.int32)
            word = _words(first, row, tl.program_id(0) % across * COLUMNS, n, k0, k1, EVEN)
            save_weight(param + offset, correction + offset, w, word, mask, STORE)
        if tl.program_id(0) == 0:
            kept = row_address(row_of_table, 3, tl.float32, False) + b % each
            tl.store(kept, tl.load(norms + batch))
    elif (tl.program_id(0) == 0) & (b % each == 0):
        tl.atomic_add(skipped, 1)


def _axes(shape: torch.Size, per_channel: bool) -> dict[str, Any]:
    right = reference.channel_dim(shape) == -1
    return {"BY_ROW": per_channel and right, "BY_COLUMN": per_channel and not right}


def apollo_factors(
    grads: Sequence[Tensor],
    projected: Tensor,
    direction: Tensor,
    finite: Tensor,
    prev_norms: Sequence[Tensor],
    per_channel: bool,
    reach: float,
) -> tuple[Tensor, Tensor, Tensor]:
    results = reference.apollo_factors_fake(grads, projected, direction, finite, prev_norms, per_channel, reach)
    s, factors, norms = results
    shape = grads[0].shape
    m, n = shape[-2:]
    each = shape[:-2].numel()
    count = each * len(grads)
    options: dict[str, Any] = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
    channels = max(m, n) if per_channel else 1
    width = projected.shape[-2:].numel() // channels
    by_row = reference.channel_dim(shape) == -1 or not per_channel
    strides = (width, 1) if by_row else (1, channels)
    block = {"CHANNELS": 32, "WIDTH": 32} if per_channel else {"CHANNELS": 1, "WIDTH": 1024}
    scale_kernel[(parts_of(channels, block["CHANNELS"]), count)](
        direction, projected, s, channels, width, *strides, **block, **options
    )
    rows = [[grad.data_ptr(), prev_norm.data_ptr()] for grad, prev_norm in zip(grads, prev_norms, strict=True)]
    table, aligned = table_on(rows, 1, projected.device)
    tiles = parts_of(m, ROWS.value) * parts_of(n, COLUMNS.value)
    programs = min(tiles, PARTS)
    parts = torch.empty(count * programs, dtype=torch.float32, device=projected.device)
    kinds = {"GRADIENT": dtype_of(grads[0].dtype), "ALIGNED": aligned}
    norm_kernel[(programs, count)](
        table, finite, s, parts, m, n, tiles, each, **kinds, **_axes(shape, per_channel), **options
    )
    padded = triton.next_power_of_2(programs)
    growth_kernel[(count,)](table, finite, parts, factors, norms, programs, each, reach, COUNT=padded, **options)
    return results


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
    each = shape[:-2].numel()
    store = "bf16_ecc" if corrections else "bf16_sr" if seeds else "keep"
    fine = corrections or params
    bits = {step: fp32_bits(-corrected_lr(lr, (beta1, beta2), step)) for step in set(steps)}  # mostly all are at one
    keys = all_seed_keys(seeds) or [(0, 0)] * len(params)
    rows = [
        [*(t.data_ptr() for t in tensors), *keys[i], bits[steps[i]]]
        for i, tensors in enumerate(zip(params, grads, fine, prev_norms, strict=True))
    ]
    table, aligned = table_on(rows, 3, s.device)
    tiles = parts_of(m, ROWS.value) * parts_of(n, COLUMNS.value)
    apollo_kernel[(tiles, each * len(params))](
        table, finite, skipped, s, factors, norms, m, n, each, math.sqrt(scale), -lr * weight_decay,
        WEIGHT=dtype_of(params[0].dtype), GRADIENT=dtype_of(grads[0].dtype), ALIGNED=aligned,
        **_axes(shape, s.shape[-2:].numel() > 1), STORE=WEIGHT_STORES.index(store), EVEN=n % GROUP.value == 0,
        num_warps=NUM_WARPS, enable_fp_fusion=False,
    )  # fmt: skip


def compile_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    """Kernels to compile ahead: a 4096 × 14336 matrix, its transpose, Mini's single factor; bf16 weights, gradients."""
    cases: list[tuple[str, Any, dict[str, str], dict[str, Any], int]] = []
    sizes = {"m": "i32:16", "n": "i32:16"}
    kinds = {"GRADIENT": tl.bfloat16, "ALIGNED": True}
    flags = {"table": "*i64", "finite_ptr": "*i32"}
    for label, by_row, by_column in (("rows", True, False), ("columns", False, True), ("matrix", False, False)):
        axes: dict[str, Any] = {"BY_ROW": by_row, "BY_COLUMN": by_column}
        block: dict[str, Any] = {"CHANNELS": 1, "WIDTH": 1024} if label == "matrix" else {"CHANNELS": 32, "WIDTH": 32}
        # A launch makes constants of strides that are 1, and of one matrix a parameter.
        strides: dict[str, str] = {"columns": {"width_stride": "i32:16"}}.get(label, {"channel_stride": "i32:16"})
        one: dict[str, Any] = {"channel_stride" if label == "columns" else "width_stride": 1}
        norms = {"direction": "*fp32", "projected": "*fp32", "out": "*fp32", "channels": "i32", "width": "i32:16"}
        cases.append((f"scale of {label}", scale_kernel, norms | strides, block | one, NUM_WARPS))
        reads = flags | {"s_ptr": "*fp32", "parts": "*fp32"} | sizes | {"tiles": "i32:16"}
        cases.append((f"norm by {label}", norm_kernel, reads, axes | kinds | {"each": 1}, NUM_WARPS))
        for store in WEIGHT_STORES:
            factors = flags | {"skipped": "*i64", "s_ptr": "*fp32", "factors": "*fp32", "norms": "*fp32"}
            constants = (
                axes | kinds | {"STORE": WEIGHT_STORES.index(store), "WEIGHT": tl.bfloat16, "EVEN": True, "each": 1}
            )
            signature = factors | sizes | {"root": "fp32", "decay": "fp32"}
            cases.append((f"step by {label} {store}", apollo_kernel, signature, constants, NUM_WARPS))
    growth = flags | {"parts": "*fp32", "factors": "*fp32", "norms": "*fp32", "count": "i32:16", "reach": "fp32"}
    return [*cases, ("growth", growth_kernel, growth, {"COUNT": PARTS, "each": 1}, NUM_WARPS)]
