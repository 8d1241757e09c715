"""Muon: the momentum of a matrix, with all its singular values made equal.

Adam gives each value of a weight a step of the same size; Muon gives each direction of a matrix one. The direction is
the orthogonal factor U Vᵀ of the momentum U S Vᵀ, which five steps of an iteration with products of matrices alone
approach: singular values end between 0.7 and 1.2, which is as good as 1 for a step. One momentum is all the state.

What was fused for speed is several matrices: queries, keys and values, gate and up, experts. Each is orthogonalised by
itself where the module says where one ends (optim/roles.py).

Of a matrix that FSDP2 has cut, every process gathers the update and makes the whole of its factor: equal bits without a
second message. One owner a matrix would divide that work, but it needs many matrices at once, which a step in backward
never has.
"""

import functools
import itertools
import math
from typing import ClassVar

import torch
from torch import Tensor

from hf_lowmem.optim.adamw import FUSED_ADAMW, adamw_update
from hf_lowmem.optim.base import LowMemOptimizer
from hf_lowmem.optim.embeddings import other_reach, other_rule, other_states, update_other
from hf_lowmem.optim.linalg import linalg
from hf_lowmem.optim.rows import is_matrix
from hf_lowmem.optim.slot import Slot
from hf_lowmem.optim.state import Group, Reach, Shape, StateDecl
from hf_lowmem.specs import check_number

# The authors' quintic, whose slope at zero is as large as five steps allow.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
LEAST_NORM = 1e-7
ADAMW_RMS = 0.2  # of AdamW's updates, which Muon's are given (arXiv 2502.16982, section 2.2)


def iteration_dtype(device: torch.device) -> torch.dtype:
    """Dtype of the iteration: bf16, which is enough for it; fp32 on a CPU, where bf16 is slow."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def orthogonalized(update: Tensor) -> Tensor:
    """Newton and Schulz's iteration on each matrix (..., m, n), towards its orthogonal factor; fp32."""
    x = update.to(iteration_dtype(update.device))
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / linalg.matrix_norm(x, keepdim=True).clamp(min=LEAST_NORM)  # no singular value above 1
    a, b, c = COEFFICIENTS
    multiply = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(STEPS):
        gram = x @ x.mT
        x = multiply(x, multiply(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(torch.float32)


def matched(update: Tensor) -> Tensor:
    """The orthogonal factor of a matrix, or of each of a batch, with the root mean square of AdamW's updates."""
    return orthogonalized(update).mul_(ADAMW_RMS * math.sqrt(max(update.shape[-2:])))


def muon_direction(update: Tensor, group: Group) -> Tensor:
    """`matched` of a whole weight, of each matrix that is fused in it."""
    sizes: list[int] | None = group["splits"]
    dim: int = group["outputs"]
    if sizes is None or sum(sizes) != update.shape[dim]:
        return matched(update)
    ends = list(itertools.accumulate(sizes))
    parts = [update.narrow(dim, end - size, size) for size, end in zip(sizes, ends, strict=True)]
    return torch.cat([matched(part) for part in parts], dim)


def _first(shape: Shape, group: Group) -> Shape | None:
    return shape if is_matrix(shape, group) else OTHERS["exp_avg"].shape(shape, group)


OTHERS = other_states(is_matrix)


class Muon(LowMemOptimizer):
    """Muon (kellerjordan.github.io/posts/muon) with the step of arXiv 2502.16982, its momentum in a codec.

    ```python
    # linear weights, (m, n); fused ones part by part, experts one by one
    M   = momentum * M + (1 - momentum) * grad               # stored signed
    u   = (1 - momentum) * grad + momentum * M               # Nesterov's
    X   = u / norm(u)                                        # transposed if m > n
    repeat 5 times: A = X @ X.T; X = 3.4445 * X + (-4.775 * A + 2.0315 * A @ A) @ X
    p  *= 1 - lr * weight_decay
    p  -= lr * 0.2 * sqrt(max(m, n)) * X
    # embedding and output head: the rule `embeddings`; norms, biases, convolutions: AdamW
    ```

    That is torch.optim.Muon with adjust_lr_fn="match_rms_adamw". X is computed in bf16, on a CPU in fp32.

    Defaults: momentum 0.95; betas (0.9, 0.999) and eps 1e-8 are AdamW's for the rest; embeddings "adam". `role`,
    `experts`, `outputs` and `splits` of a group say what its parameters are; `make_optimizer` finds them: queries, keys
    and values of Phi-3 and GPT-2, gate and up, and any linear layer with an attribute `split_sizes`. What is fused
    otherwise (GPT-NeoX's queries, keys and values head by head) is one matrix here. Bare matrices are linear weights.

    State, bytes a linear weight's parameter: fp32 4, bf16 2, 8bit and int8_softsign 1.03, int8 1.02.

    Under FSDP2 each step gathers every update, in fp32, and each process computes all of X.

    Recommended: AdamW's learning rate as it is, weight_decay 0.1, `state="8bit"`, for pre-training and for models that
    Muon has pre-trained. Not for you to fine-tune all weights of a model that Adam has pre-trained, which ends worse
    (arXiv 2605.10468; of LoRA's adapters the same paper says the contrary). Nor with small batches: X costs 5 * (4 m² n
    + 2 m³) operations a step, m the smaller side. For an 8B model that is as much as forward and backward of 14,000
    tokens, so a fifth of the time at 64,000 tokens a step, and most of it at 2,000.
    """

    name = "muon"
    STATES = {"exp_avg": StateDecl(signed=True, shape=_first), **{k: v for k, v in OTHERS.items() if k != "exp_avg"}}
    DEFAULTS: ClassVar[Group] = {
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "embeddings": "adam",
        "momentum": 0.95,
    }
    CHECKS = {"momentum": functools.partial(check_number, low=0.0, high=1.0)}
    FACTS = ("role", "experts", "outputs", "splits")
    FUSED = FUSED_ADAMW

    @classmethod
    def rule(cls, shape: Shape, group: Group) -> str:
        return cls.name if is_matrix(shape, group) else other_rule(group)

    @classmethod
    def reach(cls, shape: Shape, group: Group) -> Reach:
        return "whole" if is_matrix(shape, group) else other_reach(group)

    def update(self, p: Tensor, grad: Tensor, slot: Slot, group: Group) -> None:
        if not is_matrix(slot.shape, group):
            (adamw_update if slot.elementwise else update_other)(p, grad, slot, group)
            return
        momentum, exp_avg = group["momentum"], slot.load("exp_avg")
        exp_avg.lerp_(grad, 1 - momentum)
        update = grad.lerp(exp_avg, momentum)
        slot.save("exp_avg", exp_avg)
        if slot.cut:
            whole = slot.shards.gather(update, slot.shape[0])
            update = slot.shards.rows(muon_direction(whole, group))
        else:
            update = muon_direction(update, group)
        p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
