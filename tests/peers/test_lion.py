"""Lion against lion-pytorch, step by step."""

import math

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem.optim.lion import Lion

lion_pytorch = pytest.importorskip("lion_pytorch", reason="the oracle: pip install 'hf-lowmem[peers]'")

STEPS = 100
SHAPES = [(), (31,), (40, 24), (65, 7), (3, 20, 30)]


def gradient(shape: tuple[int, ...], step: int) -> Tensor:
    """Correlated from step to step, falling, and zero for some weights at times."""
    base = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(step + 1))
    return (base + 2 * noise) * (noise < 1.5) * math.exp(-step / 60)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.95, 0.98)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_lion_pytorch(shape: tuple[int, ...], betas: tuple[float, float], weight_decay: float) -> None:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(99))
    theirs_p, ours_p = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    settings = {"lr": 3e-3, "betas": betas, "weight_decay": weight_decay}
    theirs, ours = lion_pytorch.Lion([theirs_p], **settings), Lion([ours_p], **settings)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS) for o in (theirs, ours)]
    worst = 0.0
    for step in range(STEPS):
        for p, optimizer, schedule in zip((theirs_p, ours_p), (theirs, ours), schedules, strict=True):
            p.grad = gradient(shape, step)
            optimizer.step()
            schedule.step()
        worst = max(worst, (ours_p - theirs_p).abs().max().item())
    moved = (ours_p - start).abs().max().item()
    print(f"{shape} betas {betas} decay {weight_decay}: largest difference {worst:.1e}, moved {moved:.2f}")
    assert moved > 0.02, "the weights went somewhere"
    # A single sign that differed would show as 2 * lr = 6e-3.
    assert worst <= 1e-5


def test_the_defaults_are_the_authors() -> None:
    theirs, ours = (cls([nn.Parameter(torch.zeros(2))], lr=1e-4) for cls in (lion_pytorch.Lion, Lion))
    assert ours.param_groups[0]["betas"] == theirs.param_groups[0]["betas"]


def test_every_weight_moves_by_lr_whatever_its_gradient() -> None:
    p = nn.Parameter(torch.zeros(5))
    optimizer = Lion([p], lr=0.5)
    p.grad = torch.tensor([1e-20, -1e10, 0.0, 3.0, -1e-30])
    optimizer.step()
    assert p.tolist() == [-0.5, 0.5, 0.0, -0.5, 0.5]


def test_eps_means_nothing_to_it() -> None:
    with pytest.raises(ValueError, match="eps=1e-08 has no effect"):
        Lion([nn.Parameter(torch.zeros(5))], eps=1e-8)
