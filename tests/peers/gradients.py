"""Gradients that give an optimizer something to do, the same for it and for its oracle."""

import math

import torch
from torch import Tensor

STEPS = 100
SHAPES = [(40, 24), (24, 40), (32, 32), (65, 7), (5, 130)]  # both sides, square, odd


def gradient(shape: tuple[int, ...], step: int) -> Tensor:
    """Correlated from step to step, with a magnitude that jumps, so that a limiter of growth has work to do."""
    base = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(step + 1))
    return (base + 0.5 * noise) * (1 + 4 * (step % 17 == 0)) * math.exp(-step / 60)


def start(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(99))
