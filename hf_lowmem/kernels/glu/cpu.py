"""A gated unit's activation on a CPU: gate and up are read once, in tiles that stay in the cache.

The formulas are the reference's, in fp32; where the output is of 16 bits with its short exponential.
"""

import numpy as np
import torch
from torch import Tensor

from hf_lowmem.kernels._cpu import (
    TILE,
    bits_of,
    float32,
    from_bits,
    inlined,
    kernel,
    left,
    load_floats,
    minus,
    plain_words,
    plus,
    store_floats,
    to_bf16,
    uint32,
    widened,
)
from hf_lowmem.kernels.codecs.cpu import words_of
from hf_lowmem.kernels.exact import seed_keys
from hf_lowmem.kernels.glu import reference
from hf_lowmem.kernels.quantize.cpu import by_rows, decode_span, encode_span, layout_of, rule_of
from hf_lowmem.kernels.quantize.reference import GROUPS

E4M3 = rule_of("e4m3", None, torch.float32)[0]
GROUP = GROUPS["e4m3"].group

MAGIC, MAGIC_BITS = float32(12582912.0), uint32(0x4B400000)  # 1.5 * 2**23
LOG2_E, LN2_HIGH, LN2_LOW = (float32(x) for x in (reference.LOG2_E, reference.LN2_HIGH, reference.LN2_LOW))
T7, T6, T5, T4, T3, T2, T1, T0 = (float32(x) for x in reference.TAYLOR)
S5, S4, S3, S2, S1, S0 = (float32(x) for x in reference.SHORT)
ENDS, FLAT = float32(reference.SHORT_ENDS), float32(reference.GELU_FLAT)
ONCE, CUBE = float32(reference.SQRT_8_PI), float32(reference.SQRT_8_PI * reference.CUBIC)
SLOPE = float32(3 * reference.SQRT_8_PI * reference.CUBIC)
ONE, ZERO = float32(1.0), float32(0.0)


@inlined
def _between(x, low, high):
    """x within the bounds; a nan stays one."""
    x = low if x < low else x
    return high if x > high else x


@inlined
def _exp(x):
    """Reference: `exp`."""
    x = _between(x, float32(-86.0), float32(89.0))
    shifted = x * LOG2_E + MAGIC
    n = shifted - MAGIC
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    p = ((T7 * r + T6) * r + T5) * r + T4
    p = (((p * r + T3) * r + T2) * r + T1) * r + T0
    return p * from_bits(left(plus(minus(bits_of(shifted), MAGIC_BITS), uint32(127)), uint32(23)))


@inlined
def _exp_short(x):
    """Reference: `exp_short`."""
    t = _between(x, -ENDS, ENDS) * LOG2_E
    n = t + MAGIC
    f = t - (n - MAGIC)
    p = ((((S5 * f + S4) * f + S3) * f + S2) * f + S1) * f + S0
    return from_bits(plus(bits_of(p), left(bits_of(n), uint32(23))))


@inlined
def _activate(x, gelu, short):
    """Value and slope. Reference: `activate`."""
    z, dz = x, ONE
    if gelu:
        t = _between(x, -FLAT, FLAT)
        square = t * t
        z, dz = t * (square * CUBE + ONCE), square * SLOPE + ONCE
    if short:
        s = ONE / (_exp_short(-z) + ONE)
        s = ZERO if z < -ENDS else s
        value = x * s
    else:
        denominator = _exp(-z) + ONE
        value, s = x / denominator, ONE / denominator
    rest = value * (ONE - s)
    return value, s + (rest * dz if gelu else rest)


@inlined
def _products(gate, up, gelu, short, out, count):
    for j in range(count):
        value, _ = _activate(gate[j], gelu, short)
        out[j] = (widened(to_bf16(value)) if short else value) * up[j]


@inlined
def _slopes(grad, gate, up, gelu, short, of_gate, of_up, count):
    for j in range(count):
        value, slope = _activate(gate[j], gelu, short)
        of_gate[j], of_up[j] = (grad[j] * up[j]) * slope, grad[j] * value


@inlined
def _fetch(kind, address, scales, start, place, count, room):
    """A tile: bf16 or fp32 at `address`, or codes there and scales of the group at `place`."""
    if kind < 2:
        return load_floats(kind == 1, address, start, count, room)
    decode_span(E4M3, address + start, scales + 2 * place, count, room)
    return room


@kernel
def _forward(row, last, layout, gate, up, out, rule, codes, how, keys):
    """Products, and codes of the factors. gate, up: kind, address, address of scales; rule: whether it is gelu, and 16
    bits. codes: where codes and scales of both are to go, or zeros; how: of `encode_span`, for each.
    """
    (length, groups, n), (gelu, bf16) = layout, rule
    of_gate, of_up, of_out = np.empty(TILE, float32), np.empty(TILE, float32), np.empty(TILE, float32)
    words = np.empty(TILE, uint32)
    while row < last:
        for column in range(0, min(length, n - row * length), TILE):
            start, place = row * length + column, row * groups + column // GROUP
            count = min(TILE, length - column, n - start)
            g = _fetch(gate[0], gate[1], gate[2], start, place, count, of_gate)
            u = _fetch(up[0], up[1], up[2], start, place, count, of_up)
            if codes[0]:
                if how[0][1]:
                    plain_words(start, keys[0], keys[1], words)
                encode_span(g, count, words, codes[0] + start, codes[1] + 2 * place, how[0])
                if how[1][1]:
                    plain_words(start, keys[2], keys[3], words)
                encode_span(u, count, words, codes[2] + start, codes[3] + 2 * place, how[1])
            _products(g, u, gelu, bf16, of_out, count)
            store_floats(bf16, of_out, out, start, count)
        row += 1


@kernel
def _backward(row, last, layout, grad, gate, up, out, gelu, bf16):
    length, groups, n = layout
    of_gate, of_up, of_grad = np.empty(TILE, float32), np.empty(TILE, float32), np.empty(TILE, float32)
    d_gate, d_up = np.empty(TILE, float32), np.empty(TILE, float32)
    while row < last:
        for column in range(0, min(length, n - row * length), TILE):
            start, place = row * length + column, row * groups + column // GROUP
            count = min(TILE, length - column, n - start)
            d = _fetch(grad[0], grad[1], grad[2], start, place, count, of_grad)
            g = _fetch(gate[0], gate[1], gate[2], start, place, count, of_gate)
            u = _fetch(up[0], up[1], up[2], start, place, count, of_up)
            _slopes(d, g, u, gelu, bf16, d_gate, d_up, count)
            store_floats(bf16, d_gate, out[0], start, count)
            store_floats(bf16, d_up, out[1], start, count)
        row += 1


def _of(x: Tensor, scales: Tensor | None) -> tuple[int, int, int]:
    """`_fetch`'s view of contiguous tensors."""
    if scales is not None:
        return 2, x.data_ptr(), scales.data_ptr()
    return int(x.dtype == torch.bfloat16), x.data_ptr(), 0


def _contiguous(scales: Tensor | None) -> Tensor | None:
    return None if scales is None else scales.contiguous()


def _run(
    factors: tuple[Tensor, Tensor],
    scales: tuple[Tensor | None, Tensor | None],
    act: str,
    out: Tensor,
    codes: list[Tensor],
    seeds: tuple[int | None, int | None],
) -> None:
    """The product to `out`; where there is room for them, codes and scales of both factors to `codes`."""
    layout, bf16 = layout_of(out.shape, GROUP), out.dtype == torch.bfloat16
    of = _of(factors[0], scales[0]), _of(factors[1], scales[1]), out.data_ptr(), (act == "gelu_tanh", bf16)
    there = tuple(t.data_ptr() for t in codes) if codes else (0, 0, 0, 0)
    how = tuple(rule_of("e4m3", seed, out.dtype) for seed in seeds)
    keys = words_of(*seed_keys(seeds[0] or 0), *seed_keys(seeds[1] or 0))
    by_rows(lambda row, last: _forward(row, last, layout, *of, there, how, keys), layout)


def glu_save(
    gate: Tensor, up: Tensor, act: str, gate_seed: int | None, up_seed: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gate, up = gate.contiguous(), up.contiguous()
    out, codes = torch.empty_like(gate), [*GROUPS["e4m3"].empty(gate), *GROUPS["e4m3"].empty(up)]
    _run((gate, up), (None, None), act, out, codes, (gate_seed, up_seed))
    return out, codes[0], codes[1], codes[2], codes[3]


def glu(
    gate: Tensor, up: Tensor, gate_scales: Tensor | None, up_scales: Tensor | None, act: str, dtype: torch.dtype
) -> Tensor:
    out = torch.empty(gate.shape, dtype=dtype, device="cpu")
    scales = _contiguous(gate_scales), _contiguous(up_scales)
    _run((gate.contiguous(), up.contiguous()), scales, act, out, [], (None, None))
    return out


def glu_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_scales: Tensor | None,
    up_scales: Tensor | None,
    act: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    scales = _contiguous(gate_scales), _contiguous(up_scales)
    d_gate, d_up = (torch.empty(gate.shape, dtype=dtype, device="cpu") for _ in range(2))
    layout, gelu, bf16 = layout_of(gate.shape, GROUP), act == "gelu_tanh", dtype == torch.bfloat16
    of = _of(grad, None), _of(gate, scales[0]), _of(up, scales[1])
    out = d_gate.data_ptr(), d_up.data_ptr()
    by_rows(lambda row, last: _backward(row, last, layout, *of, out, gelu, bf16), layout)
    return d_gate, d_up
