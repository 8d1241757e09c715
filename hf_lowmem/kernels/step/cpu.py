"""One fused optimizer step on a CPU: gradient, weight and encoded states are read once and written once, by tiles.

A tile's gradient, weight and moments are fp32 in the first-level cache, and each loop over them does one part of the
step. All parameters share one call: a table has their addresses and numbers, and each thread takes a range of all their
tiles. Gradients are checked first, by a pass of their own: a bad one leaves its parameter as it was.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hf_lowmem.kernels._cpu import (
    TILE,
    add,
    bits_of,
    both,
    bytes_at,
    either,
    float32,
    fma,
    from_bits,
    halves_at,
    in_parts,
    inlined,
    int8,
    int32,
    kernel,
    left,
    load_floats,
    plus,
    random_words,
    right,
    shift_right,
    size_of,
    store_floats,
    subtract,
    uint8,
    uint16,
    uint32,
)
from hf_lowmem.kernels.adamw.reference import LEAST_SQUARE
from hf_lowmem.kernels.adamw.reference import RULES as ADAM_RULES
from hf_lowmem.kernels.codecs.cpu import addresses, state_keys, tables_of, words_of
from hf_lowmem.kernels.codecs.cpu_decode import FP32, NUMBERS, decode_tile
from hf_lowmem.kernels.codecs.cpu_encode import encode_tile, make_room
from hf_lowmem.kernels.exact import seed_keys
from hf_lowmem.kernels.step.reference import LARGEST_GRADIENT, States
from hf_lowmem.specs import WEIGHT_STORES

KEEP, BF16_SR, BF16_ECC = (WEIGHT_STORES.index(name) for name in ("keep", "bf16_sr", "bf16_ecc"))
RULES = {name: i for i, name in enumerate((*ADAM_RULES, "lion"))}
ADAMW, FAMILY, LION = RULES.values()
_LEAST_SQUARE = np.float32(LEAST_SQUARE)
_LIMIT = np.float32(LARGEST_GRADIENT).view(np.uint32)

# Columns of the table of parameters, int64.
PARAM, GRAD, CORRECTION, FIRST, SECOND, NUMEL, PLACE, KEYS = 0, 1, 2, 3, 6, 9, 10, 11


@inlined
def join_24(fine, w, count):
    """Reference: `join_24`."""
    for j in range(count):
        size = add(int32(size_of(w[j])), int32(int32(int8(fine[j])) * 256))
        sign = both(bits_of(w[j]), uint32(0x80000000))
        w[j] = from_bits(either(uint32(size if size > 0 else int32(0)), sign))


@inlined
def load_weight(store, bf16, param, correction, start, count, room):
    w = load_floats(bf16, param, start, count, room)
    if store == BF16_ECC:
        join_24(bytes_at(correction + start, count), w, count)
    return w


@inlined
def round_at_random(w, words, out, count):
    """Reference: `round_stochastic`."""
    for j in range(count):
        out[j] = uint16(right(plus(bits_of(w[j]), both(words[j], uint32(0xFFFF))), uint32(16)))


@inlined
def split_24(w, words, out, fine, count):
    """Reference: `split_24`."""
    for j in range(count):
        upper = shift_right(int32(plus(bits_of(w[j]), both(words[j], uint32(0xFF)))), int32(8))
        coarse = shift_right(add(upper, int32(128)), int32(8))
        fine[j] = uint8(subtract(upper, int32(left(uint32(coarse), uint32(8)))))
        out[j] = uint16(coarse)


@inlined
def save_weight(store, bf16, param, correction, start, count, w, words):
    """Write a tile of weights; `words`: of random bits, where the store draws."""
    if store == BF16_SR:
        round_at_random(w, words, halves_at(param + 2 * start, count), count)
    elif store == BF16_ECC:
        split_24(w, words, halves_at(param + 2 * start, count), bytes_at(correction + start, count), count)
    else:
        store_floats(bf16, w, param, start, count)


@inlined
def adamw(w, m, v, g, x, heavy):
    """x: 1 - beta1, its complement, beta2, 1 - beta2, decay, step, eps, root. `heavy`: as in step/triton.py."""
    for j in range(TILE):
        mean = fma(m[j] - g[j], x[1], g[j]) if heavy else fma(g[j] - m[j], x[0], m[j])
        square = fma(g[j] * x[3], g[j], v[j] * x[2])
        w[j] = w[j] * x[4] + (mean * x[5]) / (np.sqrt(square) / x[7] + x[6])
        m[j], v[j] = mean, square


@inlined
def inverse_root(v, eps):
    """1 / (sqrt(v) + eps). Reference: `inverse_root`."""
    return float32(1.0) / (np.sqrt(_LEAST_SQUARE if v < _LEAST_SQUARE else v) + eps)


@inlined
def adamw_coded(w, m, v, g, x, heavy):
    """`adamw` where a moment is stored in fewer bits: step and eps are those of `coded_pace`."""
    for j in range(TILE):
        mean = fma(m[j] - g[j], x[1], g[j]) if heavy else fma(g[j] - m[j], x[0], m[j])
        square = fma(fma(g[j], g[j], -v[j]), x[3], v[j])
        size = np.sqrt(_LEAST_SQUARE if square < _LEAST_SQUARE else square)
        moved = fma(mean, float32(1.0) / fma(size, x[5], x[6]), w[j] * x[4])
        w[j] = moved if x[5] != float32(0.0) else w[j]
        m[j], v[j] = mean, square


@inlined
def adam_family(w, m, v, g, x, coded):
    """x: 1 - beta1, beta1, beta2, 1 - beta2, decay, step, eps."""
    for j in range(TILE):
        mean = fma(g[j], x[0], m[j] * x[1])
        square = fma(g[j] * x[3], g[j], v[j] * x[2])
        direction = inverse_root(square, x[6]) * mean if coded else mean / (np.sqrt(square) + x[6])
        moved = fma(direction, x[5], w[j])
        w[j] = fma(moved, x[4], moved)
        m[j], v[j] = mean, square


@inlined
def lion(w, m, g, x):
    """x: 1 - beta1, beta1, beta2, 1 - beta2, decay, step."""
    for j in range(TILE):
        c = fma(g[j], x[0], m[j] * x[1])
        sign = float32(1.0) if c > float32(0.0) else (float32(-1.0) if c < float32(0.0) else float32(0.0))
        w[j] = fma(sign, x[5], w[j] * x[4])
        m[j] = fma(g[j], x[3], m[j] * x[2])


@inlined
def is_bad(x):
    """Whether a value of a tile is not finite or not below 1e15."""
    worst = uint32(0)
    for j in range(TILE):
        size = size_of(x[j])
        worst = size if size > worst else worst
    return worst >= _LIMIT


@inlined
def _place(tile, ends):
    """Index of the parameter that a tile is of; ends[i]: the number of tiles up to the end of the i-th."""
    low, high = 0, len(ends) - 1
    while low < high:
        middle = (low + high) // 2
        if ends[middle] <= tile:
            low = middle + 1
        else:
            high = middle
    return low


@kernel
def _check(tile, last, table, ends, bf16, finite):
    """Clear the flag of each parameter whose gradient is bad in one of these tiles."""
    x = np.empty(TILE, float32)
    i = _place(tile, ends)
    while tile < last:
        while ends[i] <= tile:
            i += 1
        n = table[i, NUMEL]
        start = (tile - (ends[i] - (n + TILE - 1) // TILE)) * TILE
        if is_bad(load_floats(bf16, table[i, GRAD], start, min(n - start, TILE), x)):
            finite[i] = 0
        tile += 1


@kernel
def _step(tile, last, table, ends, numbers, finite, how, of_states, bf16, tables):
    """Step these tiles of all parameters. `of_states`: for each of both, as `encode_tile` has it."""
    rule, heavy, store, draws = how
    first, second = of_states
    coded = first[0] != FP32 or second[0] != FP32
    of_g, of_w = np.empty(TILE, float32), np.empty(TILE, float32)
    of_m, of_v = np.empty(TILE, float32), np.empty(TILE, float32)
    bytes_room, room = np.zeros(TILE, uint8), make_room()
    words = np.empty(TILE, uint32)
    i = _place(tile, ends)
    while tile < last:
        while ends[i] <= tile:
            i += 1
        n = table[i, NUMEL]
        start = (tile - (ends[i] - (n + TILE - 1) // TILE)) * TILE
        count = min(n - start, TILE)
        tile += 1
        if not finite[i]:
            continue
        at = table[i]
        g = load_floats(bf16[1], at[GRAD], start, count, of_g)
        w = load_weight(store, bf16[0], at[PARAM], at[CORRECTION], start, count, of_w)
        m_at, v_at = (at[FIRST], at[FIRST + 1], at[FIRST + 2]), (at[SECOND], at[SECOND + 1], at[SECOND + 2])
        m = decode_tile(first, m_at, start, count, tables[0][0], bytes_room, of_m)
        v = of_v
        if rule == LION:
            lion(w, m, g, numbers[i])
        else:
            v = decode_tile(second, v_at, start, count, tables[1][0], bytes_room, of_v)
            if rule == ADAMW and coded:
                adamw_coded(w, m, v, g, numbers[i], heavy)
            elif rule == ADAMW:
                adamw(w, m, v, g, numbers[i], heavy)
            else:
                adam_family(w, m, v, g, numbers[i], coded)
        if store != KEEP:
            random_words(at[PLACE] + start, uint32(at[KEYS]), uint32(at[KEYS + 1]), uint32(0), words)
        save_weight(store, bf16[0], at[PARAM], at[CORRECTION], start, count, w, words)
        if draws:
            random_words(at[PLACE] + start, uint32(at[KEYS + 2]), uint32(at[KEYS + 3]), uint32(at[KEYS + 4]), words)
        encode_tile(m, words, first, m_at, start, count, tables[0], room)
        if rule != LION:
            encode_tile(v, words, second, v_at, start, count, tables[1], room)


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
    first_value: int,
    *,
    heavy: bool = False,
) -> None:
    """One step for all of `params`; arguments as those of step/launch.py's."""
    alive = [i for i, p in enumerate(params) if p.numel()]
    if not alive:
        return
    first, second = states[0], states[-1]
    table = np.zeros((len(alive), KEYS + 5), np.int64)
    for row, i in zip(table, alive, strict=True):
        p = params[i]
        correction = corrections[i] if store == "bf16_ecc" else p
        row[:NUMEL] = [
            p.data_ptr(),
            grads[i].data_ptr(),
            correction.data_ptr(),
            *addresses(list(first.of(i))),
            *addresses(list(second.of(i))),
        ]
        row[NUMEL], row[PLACE] = p.numel(), first_value
        keys = seed_keys(seeds[i]) if seeds else (0, 0)
        row[KEYS:] = words_of(*keys, *(state_keys(first.seeds[i]) if first.seeds else (0, 0, 0)))
    ends = np.cumsum(-(-table[:, NUMEL] // TILE))
    tiles = int(ends[-1])
    bf16 = params[0].dtype == torch.bfloat16, grads[0].dtype == torch.bfloat16
    finite = np.ones(len(alive), np.int32)
    in_parts(lambda begin, end: _check(begin, end, table, ends, bf16[1], finite), tiles)
    skipped.add_(int((finite == 0).sum()))
    of_rule = np.array([numbers[i] for i in alive], np.float32)
    how = RULES[rule], heavy, WEIGHT_STORES.index(store), bool(first.seeds)
    of_states = tuple((NUMBERS[state.codec], state.signed, True) for state in (first, second))
    tables = tuple(tables_of(state.codec, state.signed, True) for state in (first, second))
    in_parts(lambda begin, end: _step(begin, end, table, ends, of_rule, finite, how, of_states, bf16, tables), tiles)
