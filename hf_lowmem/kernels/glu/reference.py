"""A gated unit's activation, act(gate) * up, its quantised saves and its backward pass, in plain torch.

Both activations are one formula, as 1 + tanh(u) = 2 sigmoid(2u):

    act(x) = x * sigmoid(z(x))          silu: z = x;    gelu_tanh: z = sqrt(8 / pi) * (x + 0.044715 * x**3)
    act'(x) = s + act(x) * (1 - s) * z'(x),     s = sigmoid(z)

so one exponential is all that is needed. Written this way the tail of gelu keeps its relative accuracy, where
1 + tanh(u) cancels.

The exponential is a polynomial of single, correctly rounded fp32 operations, and not torch.exp: every device has an
exponential of its own, and the same gates would give other products on each of them. Saves are E4M3 in groups of 128
with a bf16 scale, bit for bit those of hf_lowmem/kernels/quantize.

Sources: SiLU and GELU in gated units: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202; saving gate and up
in 8 bits and computing their product again: COAT, arXiv 2410.19313, section 5.
"""

import math

import torch
from torch import Tensor

from hf_lowmem.kernels.quantize.reference import dequantize, quantize

__all__ = ["ACTIVATIONS", "activate", "exp", "glu", "glu_backward", "glu_save"]

ACTIVATIONS = ("silu", "gelu_tanh")

LOG2_E = 1 / math.log(2)
# ln 2 in two parts: the first has 9 significant bits, so that a whole number times it is exact.
LN2_HIGH = 355 / 512
LN2_LOW = math.log(2) - LN2_HIGH
TAYLOR = tuple(1 / math.factorial(k) for k in range(7, -1, -1))

SQRT_8_PI = math.sqrt(8 / math.pi)
CUBIC = 0.044715
# Beyond this gelu is x or 0 in fp32, and the cube would be on its way to inf.
GELU_FLAT = 32.0


def exp(x: Tensor) -> Tensor:
    """e**x by correctly rounded operations in a fixed order: equal bits on every device.

    ```python
    n = round(x / ln 2);  r = x - n * ln 2                      # |r| <= 0.347
    e**x = 2**n * sum(r**k / k! for k in 0..7)                  # the rest of the series: 5e-9 of it
    ```
    fp32, relative error at most 1.8 * 2**-24 between -86 and 88.3 (measured on 2e7 values); below, exp(-86) =
    4.5e-38, so that nothing is denormal; above, inf; nan stays nan. fp64 is torch.exp, for checks of the mathematics.
    """
    if x.dtype == torch.float64:
        return torch.exp(x)
    x = x.clamp(-86.0, 89.0)
    n = torch.round(x * LOG2_E)
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    p = torch.full_like(x, TAYLOR[0])
    for coefficient in TAYLOR[1:]:
        p = p * r + coefficient
    return p * ((n.to(torch.int32) + 127) << 23).view(torch.float32)


# The minimax polynomial of 2**f for |f| <= 1/2: with its roundings 2**-22 of it.
SHORT = (
    0.0013276472454890609,
    0.009675540961325169,
    0.05550713092088699,
    0.24022120237350464,
    0.6931469440460205,
    1.0000001192092896,
)

SHORT_ENDS = 86.0  # from where on its argument is cut


def exp_short(x: Tensor) -> Tensor:
    """e**x, fp32, for what is rounded to 16 bits afterwards: |x| cut at 86. Relative error 2**-22, and
    2**-24 of x, which multiplying it by 1 / ln 2 costs.

    ```python
    n = round(x / ln 2);  f = x / ln 2 - n
    e**x = 2**n * polynomial(f)
    ```
    """
    t = x.clamp(-SHORT_ENDS, SHORT_ENDS) * LOG2_E
    n = t + 1.5 * 2.0**23
    f = t - (n - 1.5 * 2.0**23)
    p = torch.full_like(f, SHORT[0])
    for coefficient in SHORT[1:]:
        p = p * f + coefficient
    return (p.view(torch.int32) + (n.view(torch.int32) << 23)).view(torch.float32)


def activate(x: Tensor, act: str, *, short: bool = False) -> tuple[Tensor, Tensor]:
    """act(x) and act'(x), in x's dtype (fp32 or fp64).

    `short`: x is fp32, and what is made of both is rounded to 16 bits. An error of 2**-20 is nothing beside that.

    Where x is -inf both are nan, as torch's silu is. Below -86, where |act(x)| is less than 4e-36, short ones are 0.
    """
    if act == "silu":
        z, dz = x, None
    else:
        t = x.clamp(-GELU_FLAT, GELU_FLAT)
        square = t * t
        z = t * (square * (SQRT_8_PI * CUBIC) + SQRT_8_PI)
        dz = square * (3 * SQRT_8_PI * CUBIC) + SQRT_8_PI
    if short:
        s = (exp_short(-z) + 1.0).reciprocal_().masked_fill_(z < -SHORT_ENDS, 0.0)
        value = x * s
    else:
        denominator = exp(-z) + 1.0
        value, s = x / denominator, torch.ones_like(x) / denominator
    rest = value * (1.0 - s)
    return value, s + (rest if dz is None else rest * dz)


def product(gate: Tensor, up: Tensor, act: str, dtype: torch.dtype) -> Tensor:
    """act(gate) rounded to dtype, times up, rounded again: the two roundings of `act(gate) * up` in torch."""
    value, _ = activate(gate, act, short=is_short(gate, dtype))
    return (value.to(dtype).to(gate.dtype) * up).to(dtype)


def is_short(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether x is fp32 and what is made of it is stored in 16 bits."""
    return x.dtype == torch.float32 and dtype.itemsize == 2


def values(saved: Tensor, scales: Tensor | None) -> Tensor:
    """A factor in fp32: widened, or decoded from its codes."""
    return saved.contiguous().to(torch.float32) if scales is None else dequantize(saved, scales, "e4m3", torch.float32)


def glu_save(
    gate: Tensor, up: Tensor, act: str, gate_seed: int | None, up_seed: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """act(gate) * up, and gate and up in E4M3.

    gate, up: (M, F) of one dtype, bf16, fp16 or fp32; act: "silu" or "gelu_tanh"; seeds: stochastic rounding of the
    codes. Returns the product (M, F) in that dtype, gate's codes uint8 (M, F) and scales bf16 (M, ceil(F / 128)), and
    up's.
    """
    out = product(values(gate, None), values(up, None), act, gate.dtype)
    return out, *quantize(gate, "e4m3", gate_seed), *quantize(up, "e4m3", up_seed)


def glu(
    gate: Tensor, up: Tensor, gate_scales: Tensor | None, up_scales: Tensor | None, act: str, dtype: torch.dtype
) -> Tensor:
    """act(gate) * up in `dtype`. With scales, gate and up are the codes of `glu_save`."""
    return product(values(gate, gate_scales), values(up, up_scales), act, dtype)


def glu_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_scales: Tensor | None,
    up_scales: Tensor | None,
    act: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up (M, F), in `dtype`; with scales, gate and up are the codes of `glu_save`.

    ```python
    d_gate = grad * up * act'(gate);  d_up = grad * act(gate)
    ```
    In fp32 throughout, rounded once, where torch rounds after every factor.
    """
    wide = values(grad, None), values(gate, gate_scales), values(up, up_scales)
    d_gate, d_up = gradients(*wide, act, short=is_short(wide[1], dtype))
    return d_gate.to(dtype), d_up.to(dtype)


def gradients(grad: Tensor, gate: Tensor, up: Tensor, act: str, *, short: bool = False) -> tuple[Tensor, Tensor]:
    value, slope = activate(gate, act, short=short)
    return (grad * up) * slope, grad * value
