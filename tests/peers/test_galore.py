"""GaLore with its exact projection against the authors' package, step by step."""

import pytest
import torch
from torch import nn

from hf_lowmem.optim.lowrank.galore import GaLore
from tests.peers.gradients import SHAPES, STEPS, gradient, start

galore_torch = pytest.importorskip("galore_torch", reason="the authors' package: pip install 'hf-lowmem[peers]'")

GAP = 30
COMMON = {"lr": 0.01, "betas": (0.9, 0.98)}


def theirs_for(p: nn.Parameter, rank: int, scale: float, weight_decay: float) -> torch.optim.Optimizer:
    group = {"params": [p], "rank": rank, "update_proj_gap": GAP, "scale": scale, "proj_type": "std"}
    return galore_torch.GaLoreAdamW([group], weight_decay=weight_decay, **COMMON)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("rank", "scale"), [(4, 0.25), (3, 2.5)])
def test_agrees_with_the_authors(rank: int, scale: float, shape: tuple[int, int], weight_decay: float) -> None:
    theirs_p, ours_p = nn.Parameter(start(shape)), nn.Parameter(start(shape))
    theirs = theirs_for(theirs_p, rank, scale, weight_decay)
    options = {"rank": rank, "scale": scale, "update_gap": GAP, "projection": "svd", "weight_decay": weight_decay}
    ours = GaLore([ours_p], **COMMON, **options)  # type: ignore[arg-type]
    bases = set()
    for step in range(STEPS):
        grad = gradient(shape, step)
        theirs_p.grad, ours_p.grad = grad.clone(), grad.clone()
        theirs.step()
        ours.step()
        bases.add(ours.state[ours_p]["basis"].sum().item())
    assert len(bases) == 4, "the basis was made anew at steps 0, 30, 60 and 90"
    assert (ours_p - start(shape)).abs().max().item() > 0.05, "the weights went somewhere"
    assert (ours_p - theirs_p).abs().max().item() <= 1e-5


@pytest.mark.parametrize("shape", [(3, 24, 40), (2, 40, 24)], ids=str)
def test_experts_agree_with_the_authors_one_by_one(shape: tuple[int, int, int]) -> None:
    ours_p = nn.Parameter(start(shape))
    ours = GaLore([ours_p], rank=4, update_gap=GAP, projection="svd", weight_decay=0.1, **COMMON)  # type: ignore[arg-type]
    single = [nn.Parameter(p.clone()) for p in start(shape)]
    theirs = [theirs_for(p, 4, 0.25, 0.1) for p in single]
    for step in range(STEPS):
        ours_p.grad = gradient(shape, step)
        ours.step()
        for p, grad, optimizer in zip(single, gradient(shape, step), theirs, strict=True):
            p.grad = grad
            optimizer.step()
    assert (ours_p - torch.stack([p.detach() for p in single])).abs().max().item() <= 1e-5


def test_agrees_with_the_authors_on_the_other_parameters() -> None:
    """Parameters without the low-rank rule: Adam in the family's order of eps and decay."""
    shape = (31, 17)
    theirs_p, ours_p = nn.Parameter(start(shape)), nn.Parameter(start(shape))
    theirs = galore_torch.GaLoreAdamW([theirs_p], weight_decay=0.1, **COMMON)
    ours = GaLore([{"params": [ours_p], "rank": None}], weight_decay=0.1, **COMMON)  # type: ignore[arg-type]
    for step in range(STEPS):
        theirs_p.grad, ours_p.grad = gradient(shape, step), gradient(shape, step)
        theirs.step()
        ours.step()
    assert (ours_p - start(shape)).abs().max().item() > 0.05
    assert (ours_p - theirs_p).abs().max().item() <= 1e-5
