"""Lion: the sign of a momentum. One state, and no second moment whose small values a codec could lose.

Each weight moves by exactly `lr` in each step, whatever the size of its gradient; weight decay is what keeps weights
bounded. The step looks ahead (`beta1`) of the momentum that is kept (`beta2`): both decay rates belong to averages of
the gradient and not, as in Adam, to two moments.

Why not bitsandbytes' Lion8bit: the codec decides the bytes here, so the same few lines run with any of them, on any
device, and resume bit for bit.
"""

from typing import ClassVar

import torch
from torch import Tensor

from hf_lowmem.kernels.lion import LION_STEP
from hf_lowmem.kernels.lion.reference import lion_
from hf_lowmem.optim.base import LowMemOptimizer
from hf_lowmem.optim.cautious import cautious_
from hf_lowmem.optim.fused import FusedStep
from hf_lowmem.optim.slot import Slot
from hf_lowmem.optim.state import Group, StateDecl
from hf_lowmem.specs import check_flag


def step_settings(group: Group, steps: list[int]) -> tuple[object, ...]:
    """Last arguments of LION_STEP: see FusedStep."""
    return group["lr"], *group["betas"], group["weight_decay"]


class Lion(LowMemOptimizer):
    """Lion (arXiv 2302.06675) whose momentum is stored by a codec.

    ```python
    # p, grad and m have one shape
    c   = sign(beta1 * m + (1 - beta1) * grad)
    p  *= 1 - lr * weight_decay
    p  -= lr * c
    m   = beta2 * m + (1 - beta2) * grad                 # stored signed
    ```

    Defaults: betas (0.9, 0.99), cautious False. There is no `eps`. `cautious=True` leaves out what goes against the
    gradient (arXiv 2411.16085; optim/cautious.py): a weight then moves by 0 or by `lr` over the share that moves.

    State, bytes a parameter: fp32 4, bf16 2, int8 1.02, fp8 1.03, fp8_expand 1.04. Parameters of fewer than 4096 values
    keep an fp32 state.

    Recommended, both for pre-training and for fine-tuning: a learning rate 3 to 10 times smaller than AdamW's and a
    weight decay 3 to 10 times larger, so that their product stays (the paper's section 5); `state="int8"`. Pre-training
    a language model that turns unstable: betas (0.95, 0.98) (same section). Let the schedule end near zero: a weight
    that has arrived still moves by `lr` a step. Not for you with batches below 64, where the paper found nothing gained
    over AdamW, or with a learning rate that you cannot tune: take `adamw`.
    """

    name = "lion"
    STATES = {"exp_avg": StateDecl(signed=True)}
    DEFAULTS: ClassVar[Group] = {"betas": (0.9, 0.99), "cautious": False}
    CHECKS = {"cautious": check_flag}
    ELEMENTWISE = True
    FUSED = FusedStep(LION_STEP, step_settings)

    def update(self, p: Tensor, grad: Tensor, slot: Slot, group: Group) -> None:
        exp_avg = slot.load("exp_avg")
        lr, betas, decay = group["lr"], group["betas"], group["weight_decay"]
        if group["cautious"]:
            step = torch.zeros_like(p)
            lion_(step, grad, exp_avg, lr=lr, betas=betas, weight_decay=0.0)
            p.mul_(1 - lr * decay).sub_(cautious_(step.neg_(), grad, slot, group))
        else:
            lion_(p, grad, exp_avg, lr=lr, betas=betas, weight_decay=decay)
        slot.save("exp_avg", exp_avg)
