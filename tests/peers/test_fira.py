"""Fira against the authors' package, and against the paper's formula in float64, where the two differ."""

import math

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem.optim.lowrank.fira import Fira
from tests.peers.gradients import SHAPES, STEPS, gradient, start

GAP = 30
BETAS = (0.9, 0.98)
LR = 0.01


def run_ours(shape: tuple[int, int], rank: int, scale: float, weight_decay: float, authors: bool) -> Tensor:
    p = nn.Parameter(start(shape))
    optimizer = Fira(
        [p], lr=LR, betas=BETAS, rank=rank, scale=scale, update_gap=GAP, projection="svd", weight_decay=weight_decay,
        authors_residual=authors,
    )  # fmt: skip
    for step in range(STEPS):
        p.grad = gradient(shape, step)
        optimizer.step()
    assert (p - start(shape)).abs().max().item() > 0.05, "the weights went somewhere"
    return p.detach()


def paper(shape: tuple[int, int], rank: int, scale: float, weight_decay: float) -> Tensor:
    """The formula in float64, on the side where the matrix is tall; the basis alone is an fp32 SVD of the gradient."""
    tall = shape[0] >= shape[1]
    p = start(shape).double()
    p = p if tall else p.T
    m = v = previous = basis = None
    for step in range(STEPS):
        grad = gradient(shape, step)
        if step % GAP == 0:
            u, _, vh = torch.linalg.svd(grad, full_matrices=False)
            basis = (vh[:rank].T if tall else u[:, :rank]).double()
        assert basis is not None
        g = grad.double() if tall else grad.double().T
        low = g @ basis
        m = (0 if m is None else BETAS[0] * m) + (1 - BETAS[0]) * low
        v = (0 if v is None else BETAS[1] * v) + (1 - BETAS[1]) * low**2
        direction = m / (v.sqrt() + 1e-6)
        phi = direction.norm(dim=1) / (low.norm(dim=1) + 1e-8)
        residual = (g - low @ basis.T) * phi[:, None]
        if previous is not None:
            residual = residual / (max(residual.norm().item() / (previous + 1e-8), 1.01) / 1.01)
        previous = residual.norm().item()
        rate = LR * math.sqrt(1 - BETAS[1] ** (step + 1)) / (1 - BETAS[0] ** (step + 1))
        p = p - rate * (scale * direction @ basis.T + residual)
        p = p - LR * weight_decay * p
    return p if tall else p.T


SETTINGS = [(4, 0.25), (3, 2.5)]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("rank", "scale"), SETTINGS)
def test_agrees_with_the_authors_in_their_mode(
    rank: int, scale: float, shape: tuple[int, int], weight_decay: float
) -> None:
    fira = pytest.importorskip("fira", reason="the authors' package: pip install --no-deps fira")
    p = nn.Parameter(start(shape))
    group = {"params": [p], "rank": rank, "update_proj_gap": GAP, "alpha": scale, "proj_type": "std"}
    optimizer = fira.FiraAdamW([group], lr=LR, betas=BETAS, weight_decay=weight_decay)
    for step in range(STEPS):
        p.grad = gradient(shape, step)
        optimizer.step()
    assert (run_ours(shape, rank, scale, weight_decay, authors=True) - p).abs().max().item() <= 1e-5


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("rank", "scale"), SETTINGS)
def test_agrees_with_the_paper(rank: int, scale: float, shape: tuple[int, int], weight_decay: float) -> None:
    ours = run_ours(shape, rank, scale, weight_decay, authors=False)
    assert (ours - paper(shape, rank, scale, weight_decay)).abs().max().item() <= 1e-5


def test_the_two_modes_differ_unless_scale_is_1() -> None:
    for scale, same in ((0.25, False), (1.0, True)):
        one, other = (run_ours((40, 24), 4, scale, 0.0, authors) for authors in (False, True))
        assert torch.equal(one, other) == same
