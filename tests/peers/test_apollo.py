"""APOLLO and APOLLO-Mini against the authors' package, step by step, with the authors' projection injected."""

import math

import pytest
import torch
from torch import nn

from hf_lowmem.optim import OPTIMIZERS
from hf_lowmem.optim.lowrank.projector import RandomProjector

apollo_torch = pytest.importorskip("apollo_torch", reason="the authors' package: pip install 'hf-lowmem[test]'")

STEPS = 100
SHAPES = [(40, 24), (24, 40), (32, 32), (65, 7), (5, 130)]  # both sides, square, odd


def gradient(shape: tuple[int, int], step: int) -> torch.Tensor:
    """Correlated from step to step, with a magnitude that jumps, so that the growth limiter has work to do."""
    base = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(step + 1))
    return (base + 0.5 * noise) * (1 + 4 * (step % 17 == 0)) * math.exp(-step / 60)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "rank", "scale"), [("apollo", 4, 1.0), ("apollo", 3, 2.5), ("apollo_mini", 1, 128.0)])
def test_agrees_with_the_authors(
    name: str, rank: int, scale: float, shape: tuple[int, int], weight_decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(99))
    theirs_p, ours_p = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    common = {"lr": 0.01, "weight_decay": weight_decay, "betas": (0.9, 0.98)}
    theirs = apollo_torch.APOLLOAdamW(
        [
            {
                "params": [theirs_p],
                "rank": rank,
                "proj": "random",
                "scale_type": "channel" if name == "apollo" else "tensor",
                "scale": scale,
                "update_proj_gap": 30,
                "proj_type": "std",
            }
        ],
        **common,
    )
    ours = OPTIMIZERS[name]([ours_p], rank=rank, scale=scale, update_gap=30, **common)

    def their_matrix(self: RandomProjector, small: int, step: int, device: torch.device) -> torch.Tensor:
        matrix = theirs.state[theirs_p]["projector"].ortho_matrix.float()
        return matrix.T if shape[0] >= shape[1] else matrix

    monkeypatch.setattr(RandomProjector, "matrix", their_matrix)
    matrices = set()
    for step in range(STEPS):
        grad = gradient(shape, step)
        theirs_p.grad, ours_p.grad = grad.clone(), grad.clone()
        theirs.step()
        ours.step()
        matrices.add(theirs.state[theirs_p]["projector"].ortho_matrix.sum().item())
    assert len(matrices) == math.ceil(STEPS / 30), "the authors' projection was refreshed as often as ours would be"
    moved = (ours_p - start).abs().max().item()
    assert moved > 0.05, "the weights went somewhere"
    assert (ours_p - theirs_p).abs().max().item() <= 1e-5


def test_agrees_with_the_authors_on_the_other_parameters() -> None:
    """Parameters without the low-rank rule: Adam in the family's order of eps and decay."""
    start = torch.randn(31, 17, generator=torch.Generator().manual_seed(1))
    theirs_p, ours_p = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    theirs = apollo_torch.APOLLOAdamW([theirs_p], lr=0.01, weight_decay=0.1)
    ours = OPTIMIZERS["apollo"]([{"params": [ours_p], "rank": None}], lr=0.01, weight_decay=0.1)
    for step in range(STEPS):
        theirs_p.grad, ours_p.grad = gradient((31, 17), step), gradient((31, 17), step)
        theirs.step()
        ours.step()
    assert (ours_p - start).abs().max().item() > 0.05
    assert (ours_p - theirs_p).abs().max().item() <= 1e-5
