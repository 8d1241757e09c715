"""LAMB: Adam's direction, as long as the weight itself is. Made for batches of tens of thousands.

A step changes each weight matrix by the fraction `lr` of its norm, so one learning rate suits layers of very different
sizes, which is what breaks first when batch and learning rate grow together.

Why not bitsandbytes' LAMB: it has no trust ratio, so it is Adam under another name.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor

from hf_lowmem.distributed import WHOLE, Whole
from hf_lowmem.optim.base import LowMemOptimizer
from hf_lowmem.optim.slot import Slot
from hf_lowmem.optim.state import Group, StateDecl
from hf_lowmem.specs import check_flag

LARGEST_NORM = 10.0  # phi(z) = min(max(z, 0), 10)


def lamb_(
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
    adapt: bool,
    experts: bool = False,
    shards: Whole = WHOLE,
) -> None:
    """One LAMB step in place, all tensors fp32 of one shape; `step` counts from 1 (arXiv 1904.00962, algorithm 2).

    `experts` of three dimensions are a batch of matrices with one ratio each, (b, 1, 1); else there is one ratio.
    Without `adapt` the ratio is 1. `shards` tells where the rest of the parameter is, if this is a part of it.
    """
    beta1, beta2 = betas
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denom = (exp_avg_sq.sqrt() / math.sqrt(1 - beta2**step)).add_(eps)
    update = (exp_avg / (1 - beta1**step)).div_(denom).add_(p, alpha=weight_decay)
    if adapt:
        update.mul_(trust_ratio(p, update, shards, experts=experts))
    p.add_(update, alpha=-lr)


def trust_ratio(p: Tensor, update: Tensor, shards: Whole = WHOLE, *, experts: bool = False) -> Tensor:
    """phi(||p||) / ||update||, for each matrix of `experts`; 1 where either norm is 0. A tensor: no device is waited
    for."""
    dims = (-2, -1) if experts and p.ndim == 3 else None
    weight, length = shards.norms(p, update, dim=dims, keepdim=dims is not None)
    weight.clamp_(max=LARGEST_NORM)
    return torch.where((weight > 0) & (length > 0), weight / length, 1.0)


class Lamb(LowMemOptimizer):
    """LAMB (arXiv 1904.00962) whose moments are stored by a codec.

    ```python
    # p, grad, m and v have one shape
    m   = beta1 * m + (1 - beta1) * grad                 # stored signed
    v   = beta2 * v + (1 - beta2) * grad**2              # stored unsigned
    u   = m / (1 - beta1**t) / (sqrt(v / (1 - beta2**t)) + eps) + weight_decay * p
    a, b  = norm(p), norm(u)                             # numbers; (batch, 1, 1) for fused experts
    ratio = min(a, 10) / b if a > 0 and b > 0 else 1
    p  -= lr * ratio * u
    ```

    Defaults: betas (0.9, 0.999), eps 1e-6, `adapt_vectors=True`, `experts=False`.

    `experts=True` says of a group that its parameters of three dimensions are batches of matrices, each with a ratio of
    its own; `make_optimizer` finds them. Any other parameter has one ratio, convolutions too.

    `adapt_vectors=False` leaves parameters with fewer than two dimensions at ratio 1, as the authors' own code does for
    biases and norms; the paper's algorithm makes no exception. The ratio holds a step to the fraction `lr` of the
    weight's norm, so a bias that starts at zero takes one step of length lr * norm(u), then steps `lr` times as long:
    it hardly moves again. A model that is trained from scratch with biases wants `False`.

    Decay is inside u, where the ratio rescales it with the rest: with a gradient that is always zero, a matrix of norm
    up to 10 shrinks by the factor 1 - lr in each step, whatever `weight_decay` > 0 is.

    State, bytes a parameter: fp32 8, bf16 4, int8 2.03, fp8 2.06, fp8_expand 2.08. Parameters of fewer than 4096 values
    keep fp32 states.

    Recommended: pre-training with batches of thousands of sequences, a learning rate that grows with the root of the
    batch (the paper's, for BERT: 6.25e-4 at 512 sequences, 5e-3 at 32 768), a long warm-up and weight_decay 0.01.
    Fine-tuning: the learning rate is relative, the fraction of a matrix's norm by which each step changes it, so 1e-4
    over 1000 steps may change a tenth of it; begin there. Not for you with small batches, where `adamw` needs less
    tuning, nor for weights that start at zero (LoRA's B), which the ratio holds there.
    """

    name = "lamb"
    STATES = {"exp_avg": StateDecl(signed=True), "exp_avg_sq": StateDecl(signed=False)}
    DEFAULTS: ClassVar[Group] = {
        "betas": (0.9, 0.999),
        "eps": 1e-6,
        "adapt_vectors": True,
        "experts": False,
    }
    CHECKS = {"adapt_vectors": check_flag, "experts": check_flag}

    def update(self, p: Tensor, grad: Tensor, slot: Slot, group: Group) -> None:
        exp_avg, exp_avg_sq = slot.load("exp_avg"), slot.load("exp_avg_sq")
        lamb_(
            p,
            grad,
            exp_avg,
            exp_avg_sq,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=slot.step,
            adapt=p.ndim >= 2 or group["adapt_vectors"],
            experts=group["experts"],
            shards=slot.shards,
        )
        slot.save("exp_avg", exp_avg)
        slot.save("exp_avg_sq", exp_avg_sq)
