"""Natural GaLore against the formula in float64, with the Fisher matrix built and solved whole."""

import math

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem.optim.lowrank.natural_galore import NaturalGaLore, natural_gradient
from tests.peers.gradients import SHAPES, STEPS, gradient, start

GAP = 30
BETAS = (0.9, 0.98)
LR = 0.01


def dense(history: list[Tensor], newest: Tensor, damping: float | None, size: int) -> Tensor:
    """inv(lambda * I + sum of h @ h.T) @ newest, all flattened, in float64."""
    columns = torch.stack([h.double().flatten() for h in history], 1)  # (N, <= s)
    strength = columns.square().sum().item() / size if damping is None else damping
    fisher = strength * torch.eye(len(columns), dtype=torch.float64) + columns @ columns.T
    solved = torch.linalg.solve(fisher, newest.double().flatten()).view(newest.shape)
    return solved * strength if damping is None else solved


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("damping", [None, 1.0, 40.0, 1e4], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_dense_solve(shape: tuple[int, int], damping: float | None, size: int) -> None:
    """Squared norms of these projected gradients go from 10 to 5,000, so the dampings are below, amid and above."""
    tall, rank, scale, weight_decay = shape[0] >= shape[1], 4, 0.5, 0.1
    ours_p = nn.Parameter(start(shape))
    optimizer = NaturalGaLore(
        [ours_p], lr=LR, betas=BETAS, rank=rank, scale=scale, update_gap=GAP, projection="svd",
        weight_decay=weight_decay, damping=damping, history=size,
    )  # fmt: skip
    p = start(shape).double() if tall else start(shape).double().T
    history: list[Tensor] = []
    m = v = torch.zeros(())
    basis = torch.zeros(())
    for step in range(STEPS):
        grad = gradient(shape, step)
        ours_p.grad = grad.clone()
        optimizer.step()

        if step % GAP == 0:
            u, _, vh = torch.linalg.svd(grad, full_matrices=False)
            basis = (vh[:rank].T if tall else u[:, :rank]).double()
        low = (grad.double() if tall else grad.double().T) @ basis
        history = [*history, low][-size:]
        natural = dense(history, low, damping, size)
        m = BETAS[0] * m + (1 - BETAS[0]) * natural
        v = BETAS[1] * v + (1 - BETAS[1]) * natural**2
        rate = LR * math.sqrt(1 - BETAS[1] ** (step + 1)) / (1 - BETAS[0] ** (step + 1))
        p = p - rate * scale * (m / (v.sqrt() + 1e-6)) @ basis.T
        p = p - LR * weight_decay * p
    assert (ours_p - start(shape)).abs().max().item() > 0.05, "the weights went somewhere"
    assert (ours_p - (p if tall else p.T)).abs().max().item() <= 1e-5


@pytest.mark.parametrize("damping", [None, 1e-3, 1.0, 1e3], ids=str)
@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
def test_a_natural_gradient_is_the_dense_solve(batch: tuple[int, ...], damping: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    history = torch.randn((*batch, 4, 30, 5), generator=generator)
    for newest in range(4):
        ours = natural_gradient(history, newest, damping)
        assert ours.shape == (*batch, 30, 5)
        matrices = zip(history.view(-1, 4, 30, 5), ours.view(-1, 30, 5), strict=True)
        for matrix, got in matrices:
            expected = dense(list(matrix), matrix[newest], damping, 4)
            # The s×s matrix has a condition number under 10 here, sums of 150 products round to 150 * 2**-24.
            assert (got - expected).norm() <= 10 * 150 * 2**-24 * expected.norm()


@pytest.mark.parametrize("damping", [None, 1e-30, 1.0], ids=str)
def test_a_degenerate_history_gives_finite_numbers(damping: float | None) -> None:
    same = torch.randn(1, 30, 5, generator=torch.Generator().manual_seed(0)).expand(4, 30, 5)
    assert natural_gradient(torch.zeros(4, 30, 5), 1, damping).eq(0).all(), "no gradient, no direction"
    got = natural_gradient(same, 2, damping)
    assert got.isfinite().all()
    cosine = (got * same[0]).sum() / (got.norm() * same[0].norm())
    # Sums of 150 products in fp32 are off by some 1e-7 of the squared norm, a tenth of the smallest damping: so are the
    # weights of the four, and the cosine by a tenth squared.
    assert cosine > 0.99, "four equal gradients only change its length"


def test_unset_damping_weakens_what_all_share_against_what_is_new() -> None:
    """The docstring's 1 + s: lambda is the squared norm that all share, and they share it s times."""
    shared = torch.zeros(4, 30, 5)
    shared[:, 0, 0] = 2.0
    assert math.isclose(natural_gradient(shared, 0, None)[0, 0].item(), 2.0 / 5, rel_tol=1e-6)
    shared[3, 1, 1] = 1e-3  # a little of a new direction in the newest, which is kept but for its tie to the shared one
    assert math.isclose(natural_gradient(shared, 3, None)[1, 1].item(), 1e-3 * (1 - 1 / 5), rel_tol=1e-5)
