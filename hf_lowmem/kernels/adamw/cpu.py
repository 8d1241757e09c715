"""Adam's fused step on a CPU: numbers for the loops of step/cpu.py, which has the formulas."""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from hf_lowmem.kernels.adamw.reference import coded_pace, corrected_lr
from hf_lowmem.kernels.step.cpu import run_steps
from hf_lowmem.kernels.step.reference import States


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
    states = States(first_codec, first, True, state_seeds), States(second_codec, second, False, state_seeds)
    weight = float(np.float32(1 - beta1))
    numbers, coded = [], {first_codec, second_codec} != {"fp32"}
    for step in steps:
        if rule == "adamw":
            # torch's lerp takes the complement of the weight in fp32.
            averages = weight, 1 - weight, beta2, 1 - beta2
            if coded:
                pace = *coded_pace(lr, (beta1, beta2), eps, step), 1.0
            else:
                pace = -lr / (1 - beta1**step), eps, math.sqrt(1 - beta2**step)
            pace = 1 - lr * weight_decay, *pace
        else:
            averages = weight, beta1, beta2, 1 - beta2
            pace = -lr * weight_decay, -corrected_lr(lr, (beta1, beta2), step), eps, 1.0
        numbers.append((*averages, *pace))
    heavy = weight >= 0.5
    run_steps(rule, params, grads, skipped, corrections, states, store, seeds, numbers, first_value, heavy=heavy)
