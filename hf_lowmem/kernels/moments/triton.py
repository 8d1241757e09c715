"""Adam's direction for projected gradients in Triton, and its moments: one launch each for all parameters of a call.

A table in device memory has a row for each parameter, with the addresses of its encoded moments and the keys of its
random numbers; gradients and directions are one tensor each.
"""

# A jit function is called with launch options, and with plain numbers where it declares constants.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowmem.kernels._device import load_fp32, magnitude, paired_words
from hf_lowmem.kernels.codecs.tiles import (
    FP32,
    NUMBERS,
    ROWS,
    SOFTSIGN,
    TILE,
    WIDTH,
    decode_tile,
    encode_tile,
    tile_offsets,
)
from hf_lowmem.kernels.codecs.triton import state_keys
from hf_lowmem.kernels.step.ahead import TABLE_TYPES
from hf_lowmem.kernels.step.cases import PAIRS
from hf_lowmem.kernels.step.launch import parts_of, table_on, tables_for, three_of
from hf_lowmem.kernels.step.reference import States
from hf_lowmem.kernels.step.triton import adam_moments as moments_of
from hf_lowmem.kernels.step.triton import family_direction, row_address, warps

# Columns of the table, int64.
SECOND, KEYS, COLUMNS = 3, 6, 9
_SECOND: tl.constexpr = tl.constexpr(SECOND)
_KEYS: tl.constexpr = tl.constexpr(KEYS)
_COLUMNS: tl.constexpr = tl.constexpr(COLUMNS)


@triton.jit
def moments_kernel(
    table, finite_ptr, projected, direction,
    m_values, m_table, m_places, m_powers, m_rows, v_values, v_table, v_places, v_powers, v_rows,
    n, x0, x1, x2, x3, eps,
    FIRST: tl.constexpr, SECOND: tl.constexpr, WRITE: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Program (j, i): the j-th tile of the i-th parameter, of n values. WRITE: its moments; else its direction.

    EVEN: all tiles are whole; ALIGNED: all addresses are multiples of 16.
    """
    CODED: tl.constexpr = FIRST != FP32 or SECOND != FP32
    i = tl.program_id(1)
    taken = True
    if WRITE:
        taken = tl.load(finite_ptr + i) != 0
    if taken:
        row = table + i * _COLUMNS
        start = tl.program_id(0).to(tl.int64) * (ROWS * WIDTH)
        left = tl.minimum(n - start, ROWS * WIDTH).to(tl.int32)
        here = i.to(tl.int64) * n + start
        local = tile_offsets()
        mask = None if EVEN else local < left
        m_codes = row_address(row, 0, tl.float32 if FIRST == FP32 else tl.uint8, ALIGNED)
        m_scale = row_address(row, 1, tl.bfloat16 if FIRST == SOFTSIGN else tl.float32, ALIGNED)
        m_power = row_address(row, 2, tl.uint8, ALIGNED)
        v_codes = row_address(row, _SECOND, tl.float32 if SECOND == FP32 else tl.uint8, ALIGNED)
        v_scale = row_address(row, _SECOND + 1, tl.float32, ALIGNED)
        v_power = row_address(row, _SECOND + 2, tl.uint8, ALIGNED)
        g = load_fp32(projected + here + local, mask)
        m = decode_tile(m_codes, m_scale, m_power, m_values, start, left, FIRST, True, EVEN)
        v = decode_tile(v_codes, v_scale, v_power, v_values, start, left, SECOND, False, EVEN)
        m, v = moments_of(m, v, g, x0, x1, x2, x3)
        if WRITE:
            k0, k1 = tl.load(row + _KEYS).to(tl.int32), tl.load(row + _KEYS + 1).to(tl.int32)
            flip = tl.load(row + _KEYS + 2).to(tl.uint32)
            word = paired_words(start, k0, k1, flip, ROWS, WIDTH) if CODED else local.to(tl.uint32)
            encode_tile(
                m, word, m_codes, m_scale, m_power, m_table, m_places, m_powers, m_rows,
                start, left, FIRST, True, True, EVEN,
            )  # fmt: skip
            encode_tile(
                v, word, v_codes, v_scale, v_power, v_table, v_places, v_powers, v_rows,
                start, left, SECOND, False, True, EVEN,
            )  # fmt: skip
        else:
            tl.store(direction + here + local, family_direction(m, v, eps, CODED), mask=mask)
            worst = tl.max(tl.max(tl.maximum(magnitude(m), magnitude(v)), axis=1), axis=0)
            if worst >= 0x7F800000:
                tl.store(finite_ptr + i, 0)


def _run(
    projected: Tensor,
    finite: Tensor,
    direction: Tensor,
    states: tuple[States, States],
    betas: tuple[float, float],
    eps: float,
    *,
    write: bool,
) -> None:
    first, second = states
    count, n = len(projected), projected[0].numel()
    keys = [state_keys(seed) for seed in first.seeds] or [(0, 0, 0)] * count
    rows = [
        [*(t.data_ptr() for t in (*three_of(first.of(i)), *three_of(second.of(i)))), *keys[i]] for i in range(count)
    ]
    table, aligned = table_on(rows, KEYS, projected.device)
    shared = (*tables_for(first.codec, True, projected), *tables_for(second.codec, False, projected))
    numbers = 1 - betas[0], betas[0], betas[1], 1 - betas[1], eps
    moments_kernel[(parts_of(n, TILE), count)](
        table, finite, projected, direction, *shared, n, *numbers,
        FIRST=NUMBERS[first.codec], SECOND=NUMBERS[second.codec], WRITE=write, ALIGNED=aligned, EVEN=n % TILE == 0,
        num_warps=warps(first.codec, second.codec), enable_fp_fusion=False,
    )  # fmt: skip


def adam_direction(
    projected: Tensor,
    finite: Tensor,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    first_codec: str,
    second_codec: str,
    beta1: float,
    beta2: float,
    eps: float,
) -> Tensor:
    states = States(first_codec, first, True, ()), States(second_codec, second, False, ())
    direction = torch.empty_like(projected)
    _run(projected, finite, direction, states, (beta1, beta2), eps, write=False)
    return direction


def adam_moments(
    projected: Tensor,
    finite: Tensor,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    first_codec: str,
    second_codec: str,
    state_seeds: Sequence[int],
    beta1: float,
    beta2: float,
) -> None:
    states = States(first_codec, first, True, state_seeds), States(second_codec, second, False, state_seeds)
    _run(projected, finite, projected, states, (beta1, beta2), 1.0, write=True)


def compile_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    """Both kernels for every pair of codecs, of whole tiles."""
    values = {f"{state}_{name}": kind for state in "mv" for name, kind in TABLE_TYPES.items()}
    pointers = {"table": "*i64", "finite_ptr": "*i32", "projected": "*fp32", "direction": "*fp32"}
    numbers = {"n": "i32:16"} | dict.fromkeys(("x0", "x1", "x2", "x3", "eps"), "fp32")
    cases: list[tuple[str, Any, dict[str, str], dict[str, Any], int]] = []
    for pair in PAIRS:
        fixed: dict[str, Any] = {"FIRST": NUMBERS[pair[0]], "SECOND": NUMBERS[pair[1]], "ALIGNED": True, "EVEN": True}
        for label, write in (("direction", False), ("moments", True)):
            name = f"{label} {','.join(dict.fromkeys(pair))}"
            cases.append((name, moments_kernel, pointers | values | numbers, fixed | {"WRITE": write}, warps(*pair)))
    return cases
