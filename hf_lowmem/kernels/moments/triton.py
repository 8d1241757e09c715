"""Adam's direction for projected gradients in Triton, and its moments: one launch each for all of a call.

A table in device memory has a row for each, with the addresses of its encoded moments and the keys of its random
numbers; gradients and directions are one tensor each. The kernel is in step/triton.py, beside that of whole steps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_lowmem.kernels.step.ahead import moments_cases
from hf_lowmem.kernels.step.cases import PAIRS
from hf_lowmem.kernels.step.launch import run_moments
from hf_lowmem.kernels.step.reference import States


def adam_direction(
    projected: Tensor,
    finite: Tensor,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    first_codec: str,
    second_codec: str,
    beta1: float,
    beta2: float,
    eps: float,
) -> Tensor:
    states = States(first_codec, first, True, ()), States(second_codec, second, False, ())
    direction = torch.empty_like(projected)
    run_moments(projected, finite, direction, states, (beta1, beta2), eps)
    return direction


def adam_moments(
    projected: Tensor,
    finite: Tensor,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    first_codec: str,
    second_codec: str,
    state_seeds: Sequence[int],
    beta1: float,
    beta2: float,
) -> None:
    states = States(first_codec, first, True, state_seeds), States(second_codec, second, False, state_seeds)
    run_moments(projected, finite, None, states, (beta1, beta2), 1.0)


def compile_cases():
    """Both for every pair of codecs, of whole tiles."""
    return moments_cases(PAIRS)
