"""AdamW with its two moments in any codec."""

from typing import ClassVar

import torch
from torch import Tensor

from hf_lowmem.kernels.adamw import ADAMW_STEP
from hf_lowmem.kernels.adamw.reference import adamw_
from hf_lowmem.optim.base import LowMemOptimizer
from hf_lowmem.optim.cautious import cautious_
from hf_lowmem.optim.fused import FusedStep
from hf_lowmem.optim.slot import Slot
from hf_lowmem.optim.state import Group, StateDecl
from hf_lowmem.specs import check_flag


def step_settings(group: Group, steps: list[int]) -> tuple[object, ...]:
    """Last arguments of ADAMW_STEP: see FusedStep."""
    return steps, "adamw", group["lr"], *group["betas"], group["eps"], group["weight_decay"]


def adamw_update(p: Tensor, grad: Tensor, slot: Slot, group: Group) -> None:
    """AdamW's step of a parameter, or of a part of one; see `Method.update`."""
    exp_avg, exp_avg_sq = slot.load("exp_avg"), slot.load("exp_avg_sq")
    cautious, decay = bool(group.get("cautious")), group["weight_decay"]
    step = torch.zeros_like(p) if cautious else p
    adamw_(
        step,
        grad,
        exp_avg,
        exp_avg_sq,
        lr=group["lr"],
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=0.0 if cautious else decay,
        step=slot.step,
        coded=slot.coded,
    )
    if cautious:
        p.mul_(1 - group["lr"] * decay).sub_(cautious_(step.neg_(), grad, slot, group))
    slot.save("exp_avg", exp_avg)
    slot.save("exp_avg_sq", exp_avg_sq)


FUSED_ADAMW = FusedStep(ADAMW_STEP, step_settings)


class AdamW(LowMemOptimizer):
    """AdamW (arXiv 1711.05101) whose moments are stored by a codec.

    ```python
    p  *= 1 - lr * weight_decay
    m   = beta1 * m + (1 - beta1) * grad                 # stored signed
    v   = beta2 * v + (1 - beta2) * grad**2              # stored unsigned
    p  -= lr * m / (1 - beta1**t) / (sqrt(v / (1 - beta2**t)) + eps)
    ```

    State, bytes a parameter: fp32 8, bf16 4, 8bit 2.07, int8 2.03, fp8_expand 2.08, int4 1.09. Parameters under 4096
    values keep fp32 states.

    Recommended: `state="8bit"` with the learning rate of your fp32 run, both for pre-training and for
    fine-tuning. Not for you when even 2 bytes a parameter are too many: take `apollo_mini`.

    `cautious=True` leaves out, and makes up for, what of an update goes against the gradient (arXiv 2411.16085; see
    optim/cautious.py). No kernel knows it.

    With `state="fp32"` the arithmetic is torch.optim.AdamW's (the single-tensor path), bit for bit.
    """

    name = "adamw"
    STATES = {"exp_avg": StateDecl(signed=True), "exp_avg_sq": StateDecl(signed=False)}
    DEFAULTS: ClassVar[Group] = {"betas": (0.9, 0.999), "eps": 1e-8, "cautious": False}
    CHECKS = {"cautious": check_flag}
    ELEMENTWISE = True
    FUSED = FUSED_ADAMW

    def update(self, p: Tensor, grad: Tensor, slot: Slot, group: Group) -> None:
        adamw_update(p, grad, slot, group)
