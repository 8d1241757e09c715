"""Lion's fused step on a CPU: numbers for the loops of step/cpu.py, which has the formula."""

from collections.abc import Sequence

from torch import Tensor

from hf_lowmem.kernels.step.cpu import run_steps
from hf_lowmem.kernels.step.reference import States


def lion_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    skipped: Tensor,
    corrections: Sequence[Tensor],
    first: Sequence[Tensor],
    first_codec: str,
    store: str,
    seeds: Sequence[int],
    state_seeds: Sequence[int],
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    first_value: int,
) -> None:
    numbers = (1 - beta1, beta1, beta2, 1 - beta2, 1 - lr * weight_decay, -lr, 0.0, 1.0)
    states = [States(first_codec, first, True, state_seeds)]
    of_each = [numbers] * len(params)
    run_steps("lion", params, grads, skipped, corrections, states, store, seeds, of_each, first_value)
