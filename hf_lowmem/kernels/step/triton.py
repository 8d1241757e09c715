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
# pyright: reportOperatorIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false

import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowmem.kernels._device import (
    as_bf16,
    bits_of,
    div,
    fma,
    from_bits,
    load_fp32,
    magnitude,
    random_word,
    sqrt,
    store_rounded,
    widen,
)
from hf_lowmem.kernels.codecs.triton import (
    FP32,
    NUM_WARPS,
    NUMBERS,
    ROWS,
    SOFTSIGN,
    TILE,
    WIDTH,
    decode_tile,
    encode_tile,
    state_keys,
    state_word,
    tables_of,
    tile_offsets,
)
from hf_lowmem.kernels.exact import seed_keys
from hf_lowmem.kernels.step.flags import fresh_flag
from hf_lowmem.kernels.step.reference import LARGEST_GRADIENT, States
from hf_lowmem.specs import WEIGHT_STORES

SMALL = 1 << 16  # values: 64 tiles, less than one for every multiprocessor of a large GPU

KEEP: tl.constexpr = tl.constexpr(0)
BF16_SR: tl.constexpr = tl.constexpr(1)
BF16_ECC: tl.constexpr = tl.constexpr(2)

RULES = {"adamw": 0, "family": 1, "lion": 2}
ADAMW: tl.constexpr = tl.constexpr(0)
FAMILY: tl.constexpr = tl.constexpr(1)
LION: tl.constexpr = tl.constexpr(2)

LIMIT: tl.constexpr = tl.constexpr(
    torch.tensor(LARGEST_GRADIENT, dtype=torch.float32, device="cpu").view(torch.int32).item()
)
# A sum of squares is never rounded to less than one of them, so half covers the errors of a square and a root.
SAFE: tl.constexpr = tl.constexpr(LARGEST_GRADIENT / 2)
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


@triton.jit
def load_weight(ptr, correction_ptr, mask, STORE: tl.constexpr):
    """A weight in fp32, from the pointers to a tile's values. Reference: `load_weight` and `join_24`."""
    w = load_fp32(ptr, mask)
    if STORE == BF16_ECC:
        fine = tl.load(correction_ptr, mask=mask, other=0).to(tl.int32)
        bits = tl.maximum(magnitude(w) + fine * 256, 0).to(tl.uint32)
        w = from_bits(bits | (bits_of(w) & 0x80000000))
    return w


@triton.jit
def save_weight(ptr, correction_ptr, w, index, mask, k0, k1, STORE: tl.constexpr):
    """Write a weight; `index`: of each value in the parameter. Reference: `save_weight` and what it calls."""
    if STORE == BF16_SR:
        bits = bits_of(w) + (random_word(index, k0, k1) & 0xFFFF)
        tl.store(ptr, as_bf16(from_bits(bits)), mask=mask)
    elif STORE == BF16_ECC:
        noise = (random_word(index, k0, k1) & 0xFF).to(tl.int32)
        upper = (bits_of(w).to(tl.int32, bitcast=True) + noise) >> 8
        coarse = (upper + 128) >> 8
        tl.store(correction_ptr, (upper - coarse * 256).to(tl.int8), mask=mask)
        tl.store(ptr, as_bf16((coarse * 65536).to(tl.float32, bitcast=True)), mask=mask)
    else:
        store_rounded(ptr, w, mask)


@triton.jit
def adamw(w, m, v, g, x0, x1, x2, x3, decay, step, eps, root, HEAVY: tl.constexpr):
    """x0, x1, x2, x3: 1 - beta1, its complement, beta2, 1 - beta2. HEAVY: x0 >= 1/2, where torch's lerp starts from its
    other end."""
    m = fma(m - g, x1, g) if HEAVY else fma(g - m, x0, m)
    v = fma(g * x3, g, v * x2)
    w = w * decay + div(m * step, div(sqrt(v), root) + eps)
    return w, m, v


@triton.jit
def adam_family(w, m, v, g, x0, x1, x2, x3, decay, step, eps):
    """x0, x1, x2, x3: 1 - beta1, beta1, beta2, 1 - beta2."""
    m = fma(g, x0, m * x1)
    v = fma(g * x3, g, v * x2)
    w = fma(div(m, sqrt(v) + eps), step, w)
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
    m_values, m_table, m_powers, m_rows, v_values, v_table, v_powers, v_rows,
    start, left, x0, x1, x2, x3, decay, step, eps, root, k0, k1, h0, h1, flip,
    RULE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, STORE: tl.constexpr, HEAVY: tl.constexpr,
):  # fmt: skip
    """The whole step of the tile that begins at value `start` (int64) and has `left` values or more.

    k0, k1: keys of the weights' random numbers; h0, h1, flip: of the states'.
    """
    local = tile_offsets()
    mask = local < left
    g = load_fp32(grad + start + local, mask)
    w = load_weight(param + start + local, correction + start + local, mask, STORE)
    m = decode_tile(m_codes, m_scale, m_power, m_values, start, left, FIRST, True)
    if RULE == LION:
        w, m = lion(w, m, g, x0, x1, x2, x3, decay, step)
    else:
        v = decode_tile(v_codes, v_scale, v_power, v_values, start, left, SECOND, False)
        if RULE == ADAMW:
            w, m, v = adamw(w, m, v, g, x0, x1, x2, x3, decay, step, eps, root, HEAVY)
        else:
            w, m, v = adam_family(w, m, v, g, x0, x1, x2, x3, decay, step, eps)
    # The weights first: their registers are free while a state is encoded, where most are needed.
    index = start.to(tl.uint32) + local.to(tl.uint32)
    save_weight(param + start + local, correction + start + local, w, index, mask, k0, k1, STORE)
    word = state_word(index, h0, h1, flip)
    encode_tile(m, word, m_codes, m_scale, m_power, m_values, m_table, m_powers, m_rows, start, left, FIRST, True, True)
    if RULE != LION:
        encode_tile(
            v, word, v_codes, v_scale, v_power, v_values, v_table, v_powers, v_rows, start, left, SECOND, False, True
        )


@triton.jit(do_not_specialize=["k0", "k1", "h0", "h1", "flip"])
def step_kernel(
    finite_ptr, param, grad, correction, m_codes, m_scale, m_power, v_codes, v_scale, v_power,
    m_values, m_table, m_powers, m_rows, v_values, v_table, v_powers, v_rows,
    n, x0, x1, x2, x3, decay, step, eps, root, k0, k1, h0, h1, flip,
    RULE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, STORE: tl.constexpr, HEAVY: tl.constexpr,
):  # fmt: skip
    """One parameter of n values."""
    if tl.load(finite_ptr) != 0:
        start = tl.program_id(0).to(tl.int64) * (ROWS * WIDTH)
        left = tl.minimum(n - start, ROWS * WIDTH).to(tl.int32)
        step_tile(
            param, grad, correction, m_codes, m_scale, m_power, v_codes, v_scale, v_power,
            m_values, m_table, m_powers, m_rows, v_values, v_table, v_powers, v_rows,
            start, left, x0, x1, x2, x3, decay, step, eps, root, k0, k1, h0, h1, flip,
            RULE, FIRST, SECOND, STORE, HEAVY,
        )  # fmt: skip


@triton.jit
def _address(row, column, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer from the table; ALIGNED: all of them are multiples of 16."""
    ptr = tl.load(row + column).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(ptr, 16) if ALIGNED else ptr


@triton.jit
def _number(row, place):
    return from_bits(tl.load(row + _NUMBERS + place).to(tl.uint32))


@triton.jit
def steps_kernel(
    table, finite_ptr,
    m_values, m_table, m_powers, m_rows, v_values, v_table, v_powers, v_rows,
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
            _address(row, 0, WEIGHT, ALIGNED),
            _address(row, 1, GRADIENT, ALIGNED),
            _address(row, 2, tl.int8, ALIGNED),
            _address(row, _FIRST, tl.float32 if FIRST == FP32 else tl.uint8, ALIGNED),
            _address(row, _FIRST + 1, tl.bfloat16 if FIRST == SOFTSIGN else tl.float32, ALIGNED),
            _address(row, _FIRST + 2, tl.uint8, ALIGNED),
            _address(row, _SECOND, tl.float32 if SECOND == FP32 else tl.uint8, ALIGNED),
            _address(row, _SECOND + 1, tl.float32, ALIGNED),
            _address(row, _SECOND + 2, tl.uint8, ALIGNED),
            m_values, m_table, m_powers, m_rows, v_values, v_table, v_powers, v_rows, start, left,
            _number(row, 0), _number(row, 1), _number(row, 2), _number(row, 3),
            _number(row, 4), _number(row, 5), _number(row, 6), _number(row, 7),
            tl.load(row + _KEYS).to(tl.int32), tl.load(row + _KEYS + 1).to(tl.int32),
            tl.load(row + _KEYS + 2).to(tl.int32), tl.load(row + _KEYS + 3).to(tl.int32),
            tl.load(row + _KEYS + 4).to(tl.int32),
            RULE, FIRST, SECOND, STORE, HEAVY,
        )  # fmt: skip


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
    grad = _address(row, 1, GRADIENT, ALIGNED)
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
    if not safe:  # noqa: SIM102 - here `and` would read the gradient all the same
        if _is_bad(grad, n, tl.program_id(0), tl.num_programs(0)):  # noqa: SIM102
            if tl.atomic_xchg(finite_ptr, 0) == 1:  # the first program that finds it
                tl.atomic_add(skipped, 1)


def warps(*codecs: str) -> int:
    """Four values a thread where memory is what a step waits for; eight where it encodes, which has a cost a thread."""
    return 2 * NUM_WARPS if set(codecs) == {"fp32"} else NUM_WARPS


def _fp32_bits(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0]


def _triton_dtype(dtype: torch.dtype) -> Any:
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]


def _three(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and power of an encoded state. What a codec has not got is another of its tensors, never read."""
    return parts[0], parts[min(1, len(parts) - 1)], parts[-1]


def _tables(codec: str, signed: bool, like: Tensor) -> tuple[Tensor, ...]:
    return (like,) * 4 if codec == "fp32" else tables_of(codec, signed, like.device)


def _table(rows: list[list[int]], device: torch.device) -> tuple[Tensor, bool]:
    """The table on the device, and whether all its addresses are aligned. Copied from pinned memory: no wait."""
    aligned = all(address % 16 == 0 for row in rows for address in row[PARAM : SECOND + 3])
    table = torch.tensor(rows, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True), aligned


def _parts(values: int, each: int) -> int:
    """How many parts of `each` cover so many values. (Triton's own `cdiv` takes as long as a launch's arguments.)"""
    return -(-values // each)


def _check_programs(largest: int) -> int:
    return min(_parts(largest, CHECK_BLOCK.value), CHECK_PROGRAMS)


def run_steps(
    rule: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    skipped: Tensor,
    corrections: Sequence[Tensor],
    states: Sequence[States],
    store: str,
    seeds: Sequence[int],
    numbers: Sequence[Sequence[float]],
    *,
    heavy: bool = False,
    norm: Tensor | None = None,
) -> None:
    """One step for all of `params`: one launch to check the gradients, one for the small ones, one for each large one.

    One parameter alone has two launches whatever its size, with its addresses as arguments: no table is copied.

    Args: as those of `adamw_step`; `states`: one or two; `numbers`: the eight of a rule's formula, for each parameter;
        `norm`: of the gradient of one parameter alone, fp32, where it is known.
    """
    count = len(params)
    if not count:
        return
    first, second = states[0], states[-1]
    fixed = {
        "RULE": RULES[rule],
        "FIRST": NUMBERS[first.codec],
        "SECOND": NUMBERS[second.codec],
        "STORE": WEIGHT_STORES.index(store),
        "HEAVY": heavy,
        "num_warps": warps(first.codec, second.codec),
        "enable_fp_fusion": False,
    }
    shared = (*_tables(first.codec, True, params[0]), *_tables(second.codec, second.signed, params[0]))
    weight_keys = [seed_keys(seed) for seed in seeds] or [(0, 0)] * count
    of_states = [state_keys(seed) for seed in first.seeds] or [(0, 0, 0)] * count
    keys = [first_two + rest for first_two, rest in zip(weight_keys, of_states, strict=True)]
    fine = corrections if store == "bf16_ecc" else params
    tensors = [
        (*here, *_three(first.of(i)), *_three(second.of(i)))
        for i, here in enumerate(zip(params, grads, fine, strict=True))
    ]
    sizes = [p.numel() for p in params]

    def step(flag: Tensor, i: int) -> None:
        grid = (_parts(sizes[i], TILE),)
        step_kernel[grid](flag, *tensors[i], *shared, sizes[i], *numbers[i], *keys[i], **fixed)

    if count == 1:
        step(_checked(grads[0], skipped, norm), 0)
        return
    # The small ones first, so that their rows and flags are the head of one table.
    order = sorted(range(count), key=lambda i: sizes[i] > SMALL)
    small = sum(size <= SMALL for size in sizes)
    bits = {id(x): [*map(_fp32_bits, x)] for x in {id(numbers[i]): numbers[i] for i in order[:small]}.values()}
    rows = [[*(t.data_ptr() for t in tensors[i]), sizes[i], *keys[i], *bits[id(numbers[i])]] for i in order[:small]]
    for i in order[small:]:  # the check reads two columns, and nothing else does
        rows.append(row := [0] * COLUMNS.value)
        row[GRAD], row[NUMEL] = grads[i].data_ptr(), sizes[i]
    table, aligned = _table(rows, params[0].device)
    finite = torch.ones(count, dtype=torch.int32, device=params[0].device)
    kinds = {"GRADIENT": _triton_dtype(grads[0].dtype), "ALIGNED": aligned, "enable_fp_fusion": False}
    check_kernel[(count, _check_programs(max(sizes)))](table, finite, **kinds, num_warps=NUM_WARPS)
    skipped.add_((finite == 0).sum())
    if small:
        kinds |= {"WEIGHT": _triton_dtype(params[0].dtype), "WHOLE": all(sizes[i] % 16 == 0 for i in order[:small])}
        grid = small, _parts(sizes[max(order[:small], key=sizes.__getitem__)], TILE)
        steps_kernel[grid](table, finite, *shared, **kinds | fixed)
    for flag, i in zip(finite.split(1)[small:], order[small:], strict=True):
        step(flag, i)


def _checked(grad: Tensor, skipped: Tensor, norm: Tensor | None) -> Tensor:
    """The flag of a gradient; a bad one is counted."""
    flag = fresh_flag(grad.device)
    check_one_kernel[(_check_programs(grad.numel()),)](
        grad, flag, skipped, flag if norm is None else norm, grad.numel(),
        NORM=norm is not None, num_warps=NUM_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return flag
