"""Adam's fused step: numbers for the kernels of step/triton.py, which has the formulas."""

import math
import struct
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hf_lowmem.kernels.adamw.reference import coded_pace, corrected_lr
from hf_lowmem.kernels.step.ahead import check_cases, step_cases
from hf_lowmem.kernels.step.cases import PAIRS
from hf_lowmem.kernels.step.launch import run_steps
from hf_lowmem.kernels.step.reference import States


def fp32(x: float) -> float:
    """A number as torch passes it to an fp32 operator: rounded once."""
    return struct.unpack("<f", struct.pack("<f", x))[0]


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
    *,
    norm: Tensor | None = None,
) -> None:
    """`adamw_step` of the reference. `norm`: of the gradient of one parameter alone, where it is known."""
    states = States(first_codec, first, True, state_seeds), States(second_codec, second, False, state_seeds)
    weight = fp32(1 - beta1)
    numbers = {}
    coded = {first_codec, second_codec} != {"fp32"}
    for step in set(steps):  # mostly all are at the same
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
        numbers[step] = *averages, *pace
    of_each = [numbers[step] for step in steps]
    heavy = weight >= 0.5
    kinds = {"heavy": heavy, "norm": norm, "first_value": first_value}
    run_steps(rule, params, grads, skipped, corrections, states, store, seeds, of_each, **kinds)


def compile_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    """The variants that are compiled ahead of time; every other pair of codecs runs, too."""
    small, best = PAIRS[0], PAIRS[-1]
    return [*check_cases(), *step_cases("adamw", PAIRS, [small, best]), *step_cases("family", [best], [])]
