"""One fused optimizer step in Triton: gradient, weight and encoded states are read once and written once.

The formulas of a method are a function of a tile (adamw/triton.py, lion/triton.py); here is what surrounds it.

**Bad gradients.** A first small kernel reads the gradients and clears a parameter's flag on the device if it finds
anything that is not finite and below 1e15; the step's kernel reads the flag and does nothing. Nobody waits, and nothing
is copied to be undone: selecting between old and new afterwards would take a second set of weights and states.

**Many small parameters.** A launch costs the host more time than a GPU needs for the few thousand values of a norm or
a bias, and those are half of a model's parameters. So all parameters up to `SMALL` values share one launch: a table in
device memory has a row of addresses and numbers for each, and a program finds its parameter by its place in the grid.
torch._foreach would need one launch an operator for the same, and a temporary each, and cannot leave out one bad
parameter. The check of the gradients is such a shared launch for parameters of all sizes. A large one is stepped by
itself, where its addresses are arguments and Triton knows how they are aligned.

What changes from step to step is passed as floats or is declared not to be specialised on: nothing is compiled twice.
"""

# A jit function is called with launch options, and with plain numbers where it declares constants.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from typing import Any

import torch
import triton
import triton.language as tl

from hf_lowmem.kernels._device import (
    as_bf16,
    bits_of,
    div,
    fma,
    from_bits,
    grouped_words,
    load_fp32,
    magnitude,
    negative,
    reciprocal,
    root_of,
    round_to,
    sqrt,
    widen,
)
from hf_lowmem.kernels.codecs.tiles import (
    FP32,
    NUM_WARPS,
    ROWS,
    SOFTSIGN,
    WIDTH,
    decode_tile,
    encode_tile,
    store_tile,
    tile_offsets,
)
from hf_lowmem.kernels.step.reference import LARGEST_GRADIENT

KEEP: tl.constexpr = tl.constexpr(0)
BF16_SR: tl.constexpr = tl.constexpr(1)
BF16_ECC: tl.constexpr = tl.constexpr(2)

RULES = {"adamw": 0, "family": 1, "lion": 2}
ADAMW: tl.constexpr = tl.constexpr(0)
FAMILY: tl.constexpr = tl.constexpr(1)
LION: tl.constexpr = tl.constexpr(2)

LEAST_SQUARE: tl.constexpr = tl.constexpr(2.0**-100)  # of adamw/reference.py

LIMIT: tl.constexpr = tl.constexpr(
    torch.tensor(LARGEST_GRADIENT, dtype=torch.float32, device="cpu").view(torch.int32).item()
)
# A sum of squares is never rounded to less than one of them, so half covers the errors of a square and a root.
SAFE: tl.constexpr = tl.constexpr(LARGEST_GRADIENT / 2)
INFINITY: tl.constexpr = tl.constexpr(0x7F800000)
CHECK_BLOCK: tl.constexpr = tl.constexpr(4096)
CHECK_PROGRAMS = 1024  # at most, for one parameter

# Columns of the table of small parameters, all int64; a number is an fp32's bits.
PARAM, GRAD, CORRECTION, FIRST, SECOND, NUMEL, KEYS, COUNT = 0, 1, 2, 3, 6, 9, 10, 15
_FIRST: tl.constexpr = tl.constexpr(FIRST)
_SECOND: tl.constexpr = tl.constexpr(SECOND)
_NUMEL: tl.constexpr = tl.constexpr(NUMEL)
_KEYS: tl.constexpr = tl.constexpr(KEYS)
_NUMBERS: tl.constexpr = tl.constexpr(COUNT)
MOST_NUMBERS = 8
COLUMNS: tl.constexpr = tl.constexpr(COUNT + MOST_NUMBERS)

# Of the table of projected gradients: the addresses of both states, and the keys of their random numbers.
MOMENTS_KEYS, MOMENTS_COLUMNS = 6, 9
_MOMENTS_KEYS: tl.constexpr = tl.constexpr(MOMENTS_KEYS)
_MOMENTS_COLUMNS: tl.constexpr = tl.constexpr(MOMENTS_COLUMNS)


@triton.jit
def load_weight(ptr, correction_ptr, mask, STORE: tl.constexpr):
    """A weight in fp32, from the pointers to a tile's values. Reference: `load_weight` and `join_24`."""
    w = load_fp32(ptr, mask)
    if STORE == BF16_ECC:
        fine = tl.load(correction_ptr) if mask is None else tl.load(correction_ptr, mask=mask, other=0)
        fine = fine.to(tl.int32)
        bits = tl.maximum(magnitude(w) + fine * 256, 0).to(tl.uint32)
        w = from_bits(bits | (bits_of(w) & 0x80000000))
    return w


@triton.jit
def save_weight(ptr, correction_ptr, w, word, mask, STORE: tl.constexpr):
    """Write a weight; `word`: random bits of each, where the store draws. Reference: `save_weight`."""
    tl.store(ptr, rounded_weight(ptr, correction_ptr, w, word, mask, STORE), mask=mask)


@triton.jit
def rounded_weight(ptr, correction_ptr, w, word, mask, STORE: tl.constexpr):
    """The value that `save_weight` is to write at `ptr`; a correction is written here."""
    if STORE == BF16_SR:
        rounded = as_bf16(from_bits(bits_of(w) + (word & 0xFFFF)))
    elif STORE == BF16_ECC:
        noise = (word & 0xFF).to(tl.int32)
        upper = (bits_of(w).to(tl.int32, bitcast=True) + noise) >> 8
        coarse = (upper + 128) >> 8
        tl.store(correction_ptr, (upper - coarse * 256).to(tl.int8), mask=mask)
        rounded = as_bf16((coarse * 65536).to(tl.float32, bitcast=True))
    else:
        rounded = round_to(ptr, w)
    return rounded


@triton.jit
def adamw(w, m, v, g, x0, x1, x2, x3, decay, step, eps, root, HEAVY: tl.constexpr):
    """x0, x1, x2, x3: 1 - beta1, its complement, beta2, 1 - beta2. HEAVY: x0 >= 1/2, where torch's lerp starts from its
    other end."""
    m = fma(m - g, x1, g) if HEAVY else fma(g - m, x0, m)
    v = fma(g * x3, g, v * x2)
    w = w * decay + div(m * step, div(sqrt(v), root) + eps)
    return w, m, v


@triton.jit
def inverse_root(v, eps):
    """1 / (sqrt(v) + eps). Reference: `inverse_root` of adamw/reference.py."""
    return reciprocal(root_of(tl.maximum(v, LEAST_SQUARE)) + eps)


@triton.jit
def adamw_coded(w, m, v, g, x0, x1, x3, decay, step, eps, HEAVY: tl.constexpr):
    """`adamw` where a moment is stored in fewer bits. Reference: `adamw_coded_`. step, eps: `coded_pace`."""
    m = fma(m - g, x1, g) if HEAVY else fma(g - m, x0, m)
    v = fma(fma(g, g, negative(v)), x3, v)
    if step != 0:  # else no rate: nothing is moved
        w = fma(m, reciprocal(fma(root_of(tl.maximum(v, LEAST_SQUARE)), step, eps)), w * decay)
    return w, m, v


@triton.jit
def adam_moments(m, v, g, x0, x1, x2, x3):
    """x0, x1, x2, x3: 1 - beta1, beta1, beta2, 1 - beta2."""
    return fma(g, x0, m * x1), fma(g * x3, g, v * x2)


@triton.jit
def family_direction(m, v, eps, CODED: tl.constexpr):
    """m / (sqrt(v) + eps). Reference: `adam_direction` of adamw/reference.py."""
    return inverse_root(v, eps) * m if CODED else div(m, sqrt(v) + eps)


@triton.jit
def adam_family(w, m, v, g, x0, x1, x2, x3, decay, step, eps, CODED: tl.constexpr):
    m, v = adam_moments(m, v, g, x0, x1, x2, x3)
    w = fma(family_direction(m, v, eps, CODED), step, w)
    return fma(w, decay, w), m, v


@triton.jit
def lion(w, m, g, x0, x1, x2, x3, decay, step):
    """x0, x1, x2, x3: 1 - beta1, beta1, beta2, 1 - beta2."""
    c = fma(g, x0, m * x1)
    sign = tl.where(c > 0, 1.0, tl.where(c < 0, -1.0, 0.0))
    return fma(sign, step, w * decay), fma(g, x3, m * x2)


@triton.jit
def step_tile(
    param, grad, correction, m_codes, m_scale, m_power, v_codes, v_scale, v_power,
    m_values, m_table, m_places, m_powers, m_rows, v_values, v_table, v_places, v_powers, v_rows,
    start, left, x0, x1, x2, x3, decay, step, eps, root, k0, k1, h0, h1, flip, place,
    RULE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, STORE: tl.constexpr, HEAVY: tl.constexpr,
    EVEN: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The whole step of the tile that begins at value `start` (int64) and has `left` values or more.

    k0, k1: keys of the weights' random numbers; h0, h1, flip: of the states'; place: of the tile's first value in the
    whole parameter (int64), by which it draws them; ALIGNED: a multiple of 32. EVEN: it is a whole tile.
    """
    CODED: tl.constexpr = FIRST != FP32 or SECOND != FP32
    local = tile_offsets()
    mask = None if EVEN else local < left
    g = load_fp32(grad + start + local, mask)
    w = load_weight(param + start + local, correction + start + local, mask, STORE)
    m = decode_tile(m_codes, m_scale, m_power, m_values, start, left, FIRST, True, EVEN)
    if RULE == LION:
        w, m = lion(w, m, g, x0, x1, x2, x3, decay, step)
    else:
        v = decode_tile(v_codes, v_scale, v_power, v_values, start, left, SECOND, False, EVEN)
        if RULE == ADAMW and CODED:
            w, m, v = adamw_coded(w, m, v, g, x0, x1, x3, decay, step, eps, HEAVY)
        elif RULE == ADAMW:
            w, m, v = adamw(w, m, v, g, x0, x1, x2, x3, decay, step, eps, root, HEAVY)
        else:
            w, m, v = adam_family(w, m, v, g, x0, x1, x2, x3, decay, step, eps, CODED)
    # The weights first: their registers are free while a state is encoded, where most are needed.
    word = grouped_words(place, k0, k1, 0, ROWS, WIDTH, ALIGNED) if STORE != KEEP else local.to(tl.uint32)
    rounded = rounded_weight(param, correction + start + local, w, word, mask, STORE)
    if CODED:
        store_tile(param + start, rounded, mask)
    else:  # fewer values a thread, which is no row of a tile
        tl.store(param + start + local, rounded, mask=mask)
    word = grouped_words(place, h0, h1, flip.to(tl.uint32), ROWS, WIDTH, ALIGNED) if CODED else word
    m_tables = m_table, m_places, m_powers, m_rows
    encode_tile(m, word, m_codes, m_scale, m_power, *m_tables, start, left, FIRST, True, True, EVEN)
    if RULE != LION:
        v_tables = v_table, v_places, v_powers, v_rows
        encode_tile(v, word, v_codes, v_scale, v_power, *v_tables, start, left, SECOND, False, True, EVEN)


@triton.jit(do_not_specialize=["k0", "k1", "h0", "h1", "flip", "first_value"])
def step_kernel(
    finite_ptr, param, grad, correction, m_codes, m_scale, m_power, v_codes, v_scale, v_power,
    m_values, m_table, m_places, m_powers, m_rows, v_values, v_table, v_places, v_powers, v_rows,
    n, x0, x1, x2, x3, decay, step, eps, root, k0, k1, h0, h1, flip, first_value,
    RULE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, STORE: tl.constexpr, HEAVY: tl.constexpr,
    EVEN: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One parameter of n values, or a part of one that begins at its value `first_value`."""
    if tl.load(finite_ptr) != 0:
        start = tl.program_id(0).to(tl.int64) * (ROWS * WIDTH)
        left = tl.minimum(n - start, ROWS * WIDTH).to(tl.int32)
        step_tile(
            param, grad, correction, m_codes, m_scale, m_power, v_codes, v_scale, v_power,
            m_values, m_table, m_places, m_powers, m_rows, v_values, v_table, v_places, v_powers, v_rows,
            start, left, x0, x1, x2, x3, decay, step, eps, root, k0, k1, h0, h1, flip, start + first_value,
            RULE, FIRST, SECOND, STORE, HEAVY, EVEN, ALIGNED,
        )  # fmt: skip


@triton.jit
def row_address(row, column, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer from a table; ALIGNED: all of them are multiples of 16."""
    ptr = tl.load(row + column).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(ptr, 16) if ALIGNED else ptr


@triton.jit
def row_number(row, place):
    return from_bits(tl.load(row + _NUMBERS + place).to(tl.uint32))


@triton.jit
def steps_kernel(
    table, finite_ptr,
    m_values, m_table, m_places, m_powers, m_rows, v_values, v_table, v_places, v_powers, v_rows,
    WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, ALIGNED: tl.constexpr, WHOLE: tl.constexpr,
    RULE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, STORE: tl.constexpr, HEAVY: tl.constexpr,
):  # fmt: skip
    """Program (i, j): the j-th tile of the i-th parameter of the table. WHOLE: all sizes are multiples of 16."""
    i = tl.program_id(0)
    row = table + i * COLUMNS
    n = tl.load(row + _NUMEL)
    if WHOLE:
        n = tl.multiple_of(n, 16)
    start = tl.program_id(1).to(tl.int64) * (ROWS * WIDTH)
    if (start < n) & (tl.load(finite_ptr + i) != 0):
        left = tl.minimum(n - start, ROWS * WIDTH).to(tl.int32)
        step_tile(
            row_address(row, 0, WEIGHT, ALIGNED),
            row_address(row, 1, GRADIENT, ALIGNED),
            row_address(row, 2, tl.int8, ALIGNED),
            row_address(row, _FIRST, tl.float32 if FIRST == FP32 else tl.uint8, ALIGNED),
            row_address(row, _FIRST + 1, tl.bfloat16 if FIRST == SOFTSIGN else tl.float32, ALIGNED),
            row_address(row, _FIRST + 2, tl.uint8, ALIGNED),
            row_address(row, _SECOND, tl.float32 if SECOND == FP32 else tl.uint8, ALIGNED),
            row_address(row, _SECOND + 1, tl.float32, ALIGNED),
            row_address(row, _SECOND + 2, tl.uint8, ALIGNED),
            m_values, m_table, m_places, m_powers, m_rows, v_values, v_table, v_places, v_powers, v_rows, start, left,
            row_number(row, 0), row_number(row, 1), row_number(row, 2), row_number(row, 3),
            row_number(row, 4), row_number(row, 5), row_number(row, 6), row_number(row, 7),
            tl.load(row + _KEYS).to(tl.int32), tl.load(row + _KEYS + 1).to(tl.int32),
            tl.load(row + _KEYS + 2).to(tl.int32), tl.load(row + _KEYS + 3).to(tl.int32),
            tl.load(row + _KEYS + 4).to(tl.int32), start,
            RULE, FIRST, SECOND, STORE, HEAVY, False, True,
        )  # fmt: skip


@triton.jit
def moments_kernel(
    table, finite_ptr, projected, direction,
    m_values, m_table, m_places, m_powers, m_rows, v_values, v_table, v_places, v_powers, v_rows,
    n, x0, x1, x2, x3, eps,
    FIRST: tl.constexpr, SECOND: tl.constexpr, WRITE: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Program (j, i): the j-th tile of the i-th projected gradient, of n values, and its encoded moments.

    WRITE: the moments are moved, where the flag is set; else the direction is written, and the flag cleared where they
    would not be finite. EVEN: all tiles are whole; ALIGNED: all addresses are multiples of 16.
    """
    CODED: tl.constexpr = FIRST != FP32 or SECOND != FP32
    i = tl.program_id(1)
    taken = True
    if WRITE:
        taken = tl.load(finite_ptr + i) != 0
    if taken:
        row = table + i * _MOMENTS_COLUMNS
        start = tl.program_id(0).to(tl.int64) * (ROWS * WIDTH)
        left = tl.minimum(n - start, ROWS * WIDTH).to(tl.int32)
        here = i.to(tl.int64) * n + start
        local = tile_offsets()
        mask = None if EVEN else local < left
        m_codes = row_address(row, 0, tl.float32 if FIRST == FP32 else tl.uint8, ALIGNED)
        m_scale = row_address(row, 1, tl.bfloat16 if FIRST == SOFTSIGN else tl.float32, ALIGNED)
        m_power = row_address(row, 2, tl.uint8, ALIGNED)
        v_codes = row_address(row, 3, tl.float32 if SECOND == FP32 else tl.uint8, ALIGNED)
        v_scale = row_address(row, 4, tl.float32, ALIGNED)
        v_power = row_address(row, 5, tl.uint8, ALIGNED)
        g = load_fp32(projected + here + local, mask)
        m = decode_tile(m_codes, m_scale, m_power, m_values, start, left, FIRST, True, EVEN)
        v = decode_tile(v_codes, v_scale, v_power, v_values, start, left, SECOND, False, EVEN)
        m, v = adam_moments(m, v, g, x0, x1, x2, x3)
        if WRITE:
            k0, k1 = tl.load(row + _MOMENTS_KEYS).to(tl.int32), tl.load(row + _MOMENTS_KEYS + 1).to(tl.int32)
            flip = tl.load(row + _MOMENTS_KEYS + 2).to(tl.uint32)
            word = grouped_words(start, k0, k1, flip, ROWS, WIDTH, True) if CODED else local.to(tl.uint32)
            m_tables = m_table, m_places, m_powers, m_rows
            v_tables = v_table, v_places, v_powers, v_rows
            encode_tile(m, word, m_codes, m_scale, m_power, *m_tables, start, left, FIRST, True, True, EVEN)
            encode_tile(v, word, v_codes, v_scale, v_power, *v_tables, start, left, SECOND, False, True, EVEN)
        else:
            tl.store(direction + here + local, family_direction(m, v, eps, CODED), mask=mask)
            worst = tl.max(tl.max(tl.maximum(magnitude(m), magnitude(v)), axis=1), axis=0)
            if worst >= INFINITY:
                tl.store(finite_ptr + i, 0)


@triton.jit
def _is_bad(grad, n, part, parts):
    """Whether a value that is not finite and below 1e15 is in the `part`-th of `parts` shares of a gradient."""
    lane = tl.arange(0, CHECK_BLOCK)
    whole = n // CHECK_BLOCK * CHECK_BLOCK  # without a mask values are read 16 bytes at a time
    worst = tl.zeros((CHECK_BLOCK,), tl.int32)
    hop = parts.to(tl.int64) * CHECK_BLOCK
    start = part.to(tl.int64) * CHECK_BLOCK
    while start < whole:  # a range of loaded numbers is beyond the interpreter of triton 3.6
        worst = tl.maximum(worst, magnitude(widen(tl.load(grad + start + lane))))
        start += hop
    if part == 0:
        worst = tl.maximum(worst, magnitude(load_fp32(grad + whole + lane, lane < (n - whole).to(tl.int32))))
    return tl.max(worst, axis=0) >= LIMIT


@triton.jit
def check_kernel(table, finite_ptr, GRADIENT: tl.constexpr, ALIGNED: tl.constexpr):
    """Clear the flag of the i-th parameter if its gradient is bad. Programs (i, ...) share the values of one."""
    i = tl.program_id(0)
    row = table + i * COLUMNS
    grad = row_address(row, 1, GRADIENT, ALIGNED)
    n = tl.load(row + _NUMEL)
    if _is_bad(grad, n, tl.program_id(1), tl.num_programs(1)):
        tl.store(finite_ptr + i, 0)


@triton.jit(do_not_specialize=["n"])
def check_one_kernel(grad, finite_ptr, skipped, norm_ptr, n, NORM: tl.constexpr):
    """`check_kernel` of a parameter that is stepped by itself: its addresses are arguments, and no table is copied.

    NORM: at `norm_ptr` is the gradient's norm. No value is larger, so one below `SAFE` spares the pass over memory.
    """
    safe = False
    if NORM:
        safe = tl.load(norm_ptr) < SAFE  # nan is not
    if not safe:  # `and` would read the gradient all the same
        bad = _is_bad(grad, n, tl.program_id(0), tl.num_programs(0))
        if bad:
            first = tl.atomic_xchg(finite_ptr, 0) == 1
            if first:  # the only program that counts it
                tl.atomic_add(skipped, 1)


def warps(*codecs: str) -> int:
    """Four values a thread where memory is what a step waits for; eight where it encodes, which has a cost a thread."""
    return 2 * NUM_WARPS if set(codecs) == {"fp32"} else NUM_WARPS


def dtype_of(dtype: torch.dtype) -> Any:
    """Triton's type of the same name."""
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]
