"""Adam's arithmetic in torch: AdamW's, and the order of eps and decay that the low-rank family has.

These are torch's own fused operators, not products and sums one by one: on a CPU they are twice as fast, and AdamW's
bits are those of torch.optim.AdamW. What they compute was found by comparison with exactly rounded candidates, on an
AVX-512 and an AVX2 CPU, and the Triton kernel does the same:

    a.lerp_(b, w)                fma(w, b - a, a)             w < 1/2; else fma(a - b, 1 - w, b)
    a.addcmul_(b, c, value=w)    fma(w * b, c, a)
    a.add_(b, alpha=w)           fma(w, b, a)
    a.addcdiv_(b, c, value=w)    a + (w * b) / c

One is not correctly rounded: a CPU's `sqrt` is off by a unit in the last place for every sixth value. See `root`.

**Coded states.** Where a moment is stored in few bits there is no bit of torch's to keep, and the same formula is
written so that it costs a device least: one root and one reciprocal in place of one root and two divisions, the rate
inside of the reciprocal (`coded_pace`). Its root is of LEAST_SQUARE at least, 2**-100, from where on a kernel's short
root is correctly rounded. At the usual eps of 1e-8 that moves an update by less than a part in 10**5 where a second
moment is below it, and by nothing anywhere else.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_lowmem.kernels.exact import fma, sqrt, sqrt_wide
from hf_lowmem.kernels.registry import current_impl
from hf_lowmem.kernels.step.reference import States, each_finite, on_the_cpu

RULES = ("adamw", "family")

LEAST_SQUARE = 2.0**-100
LEAST_RATE = 2.0**-60


def root(x: Tensor) -> Tensor:
    """The square root of fp32 states, a fresh tensor: on a CPU torch's own, unless an implementation is forced.

    That has the bits of torch.optim.AdamW, and a fifth of the exact one's time. So no CPU kernel steps such states
    unless it is forced; and who forces an implementation compares two, so that then the root is exact.
    """
    return x.sqrt() if x.device.type != "cpu" or current_impl() == "auto" else sqrt(x)


def adamw_(
    p: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    coded: bool = False,
) -> None:
    """One AdamW step in place, all tensors fp32 of one shape; `step` counts from 1.

    Decay acts on the weight as it was, eps is added after bias correction (arXiv 1711.05101, algorithm 2).
    `coded`: whether a moment is stored in fewer bits than fp32.
    """
    beta1, beta2 = betas
    exp_avg.lerp_(grad, 1 - beta1)
    if coded:
        exp_avg_sq.add_(fma(grad, grad, -exp_avg_sq), alpha=1 - beta2)
        pace, shift = coded_pace(lr, betas, eps, step)
        if pace:
            inverse = safe_root(exp_avg_sq)
            inverse = torch.add(torch.full_like(inverse, shift), inverse, alpha=pace).reciprocal_()
            p.mul_(1 - lr * weight_decay).addcmul_(exp_avg, inverse)
        return
    p.mul_(1 - lr * weight_decay)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    p.addcdiv_(exp_avg, root(exp_avg_sq).div_(math.sqrt(1 - beta2**step)).add_(eps), value=-lr / (1 - beta1**step))


def coded_pace(lr: float, betas: tuple[float, float], eps: float, step: int) -> tuple[float, float]:
    """a and b of an update m / (sqrt(v) * a + b); `step` counts from 1. Zeros where the rate is below 2**-60.

    Such a rate, as that of a warm-up's first step, moves nothing: the reciprocal is not for numbers above 2**125.
    """
    corrected = math.sqrt(1 - betas[1] ** step)
    rate = -lr * corrected / (1 - betas[0] ** step)
    return (1 / rate, eps * corrected / rate) if abs(rate) >= LEAST_RATE else (0.0, 0.0)


def safe_root(x: Tensor) -> Tensor:
    """sqrt(x), a fresh tensor; correctly rounded, and of LEAST_SQUARE at least."""
    y = x.clamp(min=LEAST_SQUARE)
    return y.copy_(sqrt_wide(y)) if x.device.type == "cpu" else y.sqrt_()


def inverse_root(x: Tensor, eps: float) -> Tensor:
    """1 / (sqrt(x) + eps), a fresh tensor, of `safe_root`."""
    return safe_root(x).add_(eps).reciprocal_()


def adam_moments_(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, betas: tuple[float, float]) -> None:
    """Move both averages by a gradient, in place."""
    beta1, beta2 = betas
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)


def adam_direction(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    betas: tuple[float, float],
    eps: float,
    coded: bool = False,
) -> Tensor:
    """Update both moments in place and return m / (sqrt(v) + eps), without bias correction.

    `coded`: whether a moment is stored in fewer bits than fp32.
    """
    adam_moments_(grad, exp_avg, exp_avg_sq, betas)
    if coded:
        return inverse_root(exp_avg_sq, eps).mul_(exp_avg)
    return exp_avg / root(exp_avg_sq).add_(eps)


def corrected_lr(lr: float, betas: tuple[float, float], step: int) -> float:
    """Learning rate times Adam's bias correction; `step` counts from 1."""
    return lr * math.sqrt(1 - betas[1] ** step) / (1 - betas[0] ** step)


def adam_family_(
    p: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    coded: bool = False,
) -> None:
    """One step of Adam as the low-rank family takes it: eps before bias correction, decay after the update."""
    descend_(p, adam_direction(grad, exp_avg, exp_avg_sq, betas, eps, coded), lr, betas, weight_decay, step)


def descend_(p: Tensor, update: Tensor, lr: float, betas: tuple[float, float], weight_decay: float, step: int) -> None:
    """The family's last two lines, in place."""
    p.add_(update, alpha=-corrected_lr(lr, betas, step))
    p.add_(p, alpha=-lr * weight_decay)


@on_the_cpu
def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    skipped: Tensor,
    corrections: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    first_codec: str,
    second_codec: str,
    store: str,
    seeds: Sequence[int],
    state_seeds: Sequence[int],
    steps: Sequence[int],
    rule: str,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    first_value: int,
) -> None:
    """One step for each of `params`, from its encoded moments and back, in place.

    ```python
    for p, grad, m, v in zip(...):
        if all(abs(grad) < 1e15):                       # a bad gradient leaves all as it was
            w, m, v = wide(p), decode(m), decode(v)
            adamw_(w, grad, m, v)                       # "family": adam_family_
            m, v, p = encode(m), encode(v), rounded(w)
    ```

    Args:
        params: contiguous, all of one dtype (bf16, fp16 or fp32).
        grads: of the same shapes, contiguous, all of one dtype (bf16, fp16 or fp32).
        skipped: one int64, to which the number of bad gradients is added.
        corrections: int8 of the same shapes with store "bf16_ecc", else none.
        first, second: the tensors of each parameter's encoded moments, one parameter after another: its values with
            codec "fp32", else codes and scalars.
        first_codec, second_codec: "fp32" or a name of kernels/codecs.
        store: "keep", "bf16_sr" or "bf16_ecc".
        seeds: of the random numbers of "bf16_sr" and "bf16_ecc", one a parameter, else none.
        state_seeds: of those that the states are rounded by, one a parameter; none where both codecs are "fp32".
        steps: of each parameter, this one included.
        rule: "adamw" or "family".
        first_value: of one parameter alone that is a part of another: the place of its first value there, an even
            number, which decides what random numbers it draws.
    """
    update = adamw_ if rule == "adamw" else adam_family_
    numbers = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay}
    numbers["coded"] = {first_codec, second_codec} != {"fp32"}
    moments = States(first_codec, first, True, state_seeds), States(second_codec, second, False, state_seeds)
    for i, weights, grad in each_finite(params, grads, skipped, corrections, store, seeds, first_value):
        m, v = (states.load(i) for states in moments)
        update(weights, grad, m, v, step=steps[i], **numbers)
        for states, value in zip(moments, (m, v), strict=True):
            states.save(i, value, first_value)
