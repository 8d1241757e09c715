"""Lion's fused step: numbers for the kernels of step/triton.py, which has the formula."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hf_lowmem.kernels.codecs.tiles import NUMBERS
from hf_lowmem.kernels.step.ahead import step_cases
from hf_lowmem.kernels.step.launch import run_steps
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
    *,
    norm: Tensor | None = None,
) -> None:
    """`lion_step` of the reference. `norm`: of the gradient of one parameter alone, where it is known."""
    numbers = (1 - beta1, beta1, beta2, 1 - beta2, 1 - lr * weight_decay, -lr, 0.0, 1.0)
    states = [States(first_codec, first, True, state_seeds)]
    of_each = [numbers] * len(params)
    kinds = {"norm": norm, "first_value": first_value}
    run_steps("lion", params, grads, skipped, corrections, states, store, seeds, of_each, **kinds)


def compile_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    return step_cases("lion", [(codec, codec) for codec in NUMBERS], [("fp32", "fp32")])
