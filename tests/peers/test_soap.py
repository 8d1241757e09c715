"""SOAP against pytorch_optimizer's, step by step, and what its basis promises.

The two differ in the first step alone: theirs takes the basis from the first gradient and leaves the weights, ours
moves them by Adam meanwhile. So the oracle is handed our weights after it. It is also handed our first basis: a
gradient of low rank leaves part of it free, any rotation of which is as good, and Adam is not invariant to rotations.
From there on both go their own way through every refresh; signs of a basis vector cancel in the update.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem.codecs import CODECS
from hf_lowmem.memory import optimizer_bytes
from hf_lowmem.optim import slot
from hf_lowmem.optim import soap as module
from hf_lowmem.optim.soap import Side, Soap, eigenbasis, refresh_, rotate, soap_

STEPS = 100
SHAPES = [(40, 24), (24, 40), (32, 32), (65, 7), (5, 130), (9, 1), (10_001, 3)]


def gradient(shape: tuple[int, ...], step: int) -> Tensor:
    """Correlated from step to step, and falling."""
    base = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(step + 1))
    return (base + 0.5 * noise) * math.exp(-step / 60)


def oracle(p: nn.Parameter, **settings: Any) -> torch.optim.Optimizer:
    package = pytest.importorskip("pytorch_optimizer", reason="the oracle: pip install 'hf-lowmem[peers]'")
    return package.SOAP([p], **settings)


def bases(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> list[Tensor]:
    return [optimizer.state[p][f"basis_{side}"] for side in ("left", "right") if f"basis_{side}" in optimizer.state[p]]


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        *((shape, {"weight_decay": 0.1}) for shape in SHAPES),
        ((40, 24), {"weight_decay": 0.0, "betas": (0.9, 0.98)}),
        ((40, 24), {"betas": (0.9, 0.98), "shampoo_beta": 0.8, "weight_decay": 0.0, "eps": 1e-6}),
        ((40, 24), {"update_gap": 1, "weight_decay": 0.1}),
    ],
    ids=str,
)
def test_agrees_with_the_oracle(shape: tuple[int, int], settings: dict[str, Any]) -> None:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(99))
    theirs_p, ours_p = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    gap = settings.get("update_gap", 10)
    rest: dict[str, Any] = {"lr": 3e-3} | {k: v for k, v in settings.items() if k != "update_gap"}
    theirs = oracle(theirs_p, precondition_frequency=gap, **rest)
    ours = Soap([ours_p], update_gap=gap, **rest)
    worst, refreshed, last = 0.0, 0, None
    for step in range(STEPS + 1):
        theirs_p.grad, ours_p.grad = gradient(shape, step), gradient(shape, step)
        theirs.step()
        ours.step()
        if step == 0:
            theirs_p.data.copy_(ours_p.data)
            ours_bases = [b.clone() for b in bases(ours, ours_p)]
            theirs.state[theirs_p]["Q"] = [
                ours_bases.pop(0) if len(old) else old for old in theirs.state[theirs_p]["Q"]
            ]
            assert not ours_bases, "both precondition the same dimensions"
        now = torch.cat([basis.flatten() for basis in bases(ours, ours_p)])
        refreshed += last is not None and not torch.equal(now, last)
        last = now
        worst = max(worst, (ours_p - theirs_p).abs().max().item())
    moved = (ours_p - start).abs().max().item()
    print(f"{shape} {settings}: largest difference {worst:.1e}, moved {moved:.2f}, {refreshed} refreshes")
    assert refreshed == STEPS // gap
    assert moved > 0.05, "the weights went somewhere"
    assert worst <= 1e-5


@pytest.mark.parametrize("shape", [(31,), ()], ids=str)
def test_agrees_with_the_oracle_on_the_other_parameters(shape: tuple[int, ...]) -> None:
    """Adam, from the first step on, where the oracle begins with its second."""
    start = torch.randn(shape, generator=torch.Generator().manual_seed(99))
    theirs_p, ours_p = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    theirs = oracle(theirs_p, lr=3e-3, weight_decay=0.1)
    ours = Soap([ours_p], lr=3e-3, weight_decay=0.1)
    theirs_p.grad = gradient(shape, 0)
    theirs.step()
    for step in range(STEPS):
        theirs_p.grad, ours_p.grad = gradient(shape, step), gradient(shape, step)
        theirs.step()
        ours.step()
    assert (ours_p - start).abs().max() > 0.05, "the weights went somewhere"
    assert (ours_p - theirs_p).abs().max() <= 1e-5


def test_a_batch_is_its_matrices_one_by_one() -> None:
    shape = (3, 20, 12)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(99))
    batch, single = nn.Parameter(start.clone()), [nn.Parameter(x.clone()) for x in start]
    whole, apart = Soap([batch], lr=3e-3, experts=True), Soap(single, lr=3e-3)
    for step in range(STEPS):
        batch.grad = gradient(shape, step)
        for p, g in zip(single, batch.grad.unbind(), strict=True):
            p.grad = g.clone()
        whole.step()
        apart.step()
    assert (batch - start).abs().max() > 0.05
    assert (batch - torch.stack(list(single))).abs().max() <= 1e-5  # products of a batch may be summed in another order


def test_the_first_step_is_adam_s_and_leaves_no_moments() -> None:
    start = torch.randn(65, 7, generator=torch.Generator().manual_seed(99))
    p = nn.Parameter(start.clone())
    optimizer = Soap([p], lr=0.01, weight_decay=0.5)
    p.grad = gradient((65, 7), 0)
    optimizer.step()
    g = p.grad.double()
    moved = start.double() - 0.01 * g / (g.abs() + 1e-8 / math.sqrt(1 - 0.95))
    torch.testing.assert_close(p.detach().double(), moved * (1 - 0.01 * 0.5), rtol=0, atol=5e-7)
    assert not optimizer.state[p]["exp_avg"].any()
    assert not optimizer.state[p]["exp_avg_sq"].any()


def off_diagonal(factor: Tensor, basis: Tensor) -> float:
    """How much of Qᵀ F Q is beside the diagonal; 0 for eigenvectors."""
    inner = basis.double().mT @ factor.double() @ basis.double()
    return ((inner - inner.diag().diag()).norm() / inner.norm()).item()


def test_the_basis_begins_with_the_eigenvectors_and_follows_them() -> None:
    shape = (40, 24)
    p = nn.Parameter(torch.zeros(shape))
    optimizer = Soap([p], lr=0.0, shampoo_beta=0.99)
    scale = torch.logspace(0, -1, 24)
    for step in range(201):
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step)) * scale
        optimizer.step()
        if step in (0, 20, 200):
            state = optimizer.state[p]
            left, right = (off_diagonal(state[f"factor_{s}"], state[f"basis_{s}"]) for s in ("left", "right"))
            for basis in bases(optimizer, p):
                eye = torch.eye(len(basis))
                torch.testing.assert_close(basis.mT @ basis, eye, rtol=0, atol=5e-6)
            if step == 0:
                assert max(left, right) < 1e-5, "exact but for fp32"
            if step == 200:
                assert right < 0.1, "a power step each ten gradients keeps up with an average over a hundred"
    # The columns' scales are the eigenvalues' roots, so the right basis has found them, in falling order.
    assert state["basis_right"][0, 0].abs() > 0.9


def test_a_refresh_changes_the_basis_of_the_first_moment_and_not_the_moment() -> None:
    m, n = 40, 24
    grads = [gradient((m, n), i) for i in range(4)]
    left = sum((g @ g.mT for g in grads[:2]), torch.zeros(m, m))
    right = sum((g.mT @ g for g in grads[:2]), torch.zeros(n, n))
    sides = [Side(-2, left, eigenbasis(left)), Side(-1, right, eigenbasis(right))]
    sides[0].factor.add_(grads[2] @ grads[2].mT)
    sides[1].factor.add_(grads[3].mT @ grads[3])
    before = [side.basis.clone() for side in sides]
    exp_avg, exp_avg_sq = rotate(grads[0], sides), rotate(grads[1], sides).square()
    values = exp_avg_sq.flatten().sort().values
    refresh_(sides, exp_avg, exp_avg_sq)
    for side, old in zip(sides, before, strict=True):
        assert (side.basis.abs() - old.abs()).abs().max() > 0.01, "the basis has turned"
    # Four products of orthogonal matrices; sums of 40 terms of size 1 in fp32 are good to 40 * 2**-24 each.
    assert (rotate(exp_avg, sides, back=True) - grads[0]).abs().max() <= 1e-5
    assert torch.equal(exp_avg_sq.flatten().sort().values, values), "the second moment is sorted anew, no more"


def test_the_stored_first_moment_suits_a_codec() -> None:
    """Why the first moment is kept in the rotated basis: int8 there, and int8 of what it is without rotation."""
    m, n = 48, 64
    u, v = (torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(d))).Q for d in (m, n))
    fall = torch.logspace(0, -2, m)[:, None] * torch.logspace(0, -2, n)
    int8 = CODECS["int8"]

    def coded(x: Tensor) -> Tensor:
        stored = int8.init(x, signed=True)
        int8.encode_(stored, x)
        return int8.decode(stored, x.shape)

    results = {}
    for kind in ("fp32", "rotated", "plain"):
        p, exp_avg, exp_avg_sq = (torch.zeros(m, n) for _ in range(3))
        sides = [Side(dim, torch.zeros(d, d), torch.zeros(d, d)) for dim, d in ((-2, m), (-1, n))]
        for step in range(50):
            soap_(
                p,
                u @ (gradient((m, n), step) * fall) @ v.mT,
                exp_avg,
                exp_avg_sq,
                sides,
                lr=0.01,
                betas=(0.95, 0.95),
                shampoo_beta=0.95,
                eps=1e-8,
                weight_decay=0.0,
                step=step,
                refresh=step % 10 == 0,
            )
            if kind == "rotated":
                exp_avg = coded(exp_avg)
            elif kind == "plain":
                exp_avg = rotate(coded(rotate(exp_avg, sides, back=True)), sides)
        results[kind] = p
    rotated, plain = (
        ((results[kind] - results["fp32"]).norm() / results["fp32"].norm()).item() for kind in ("rotated", "plain")
    )
    print(f"distance from fp32 moments: rotated {rotated:.3f}, plain {plain:.3f}")
    assert 0 < rotated < plain / 10


def test_a_solver_that_does_not_converge_in_fp32_is_asked_again_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    factor = torch.diag(torch.tensor([1.0, 3.0, 2.0]))
    solve, asked = torch.linalg.eigh, []

    def reluctant(x: Tensor) -> Any:
        asked.append(x.dtype)
        if x.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return solve(x)

    monkeypatch.setattr(torch.linalg, "eigh", reluctant)
    basis = eigenbasis(factor)
    assert asked == [torch.float32, torch.float64]
    assert basis.dtype == torch.float32
    assert basis.abs().argmax(0).tolist() == [1, 2, 0], "columns by falling eigenvalue"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_bad_first_gradient_leaves_adam_until_the_first_refresh(
    asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slot, "reads_are_free", lambda device: not asynchronous)
    shape = (2, 12, 9)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    p, flat = nn.Parameter(start.clone()), nn.Parameter(start.flatten())
    one, adam = Soap([p], lr=0.01, experts=True), Soap([flat], lr=0.01)
    p.grad = torch.full(shape, math.nan)
    one.step()
    assert torch.equal(p, start)
    for step in range(10):
        p.grad = gradient(shape, step)
        flat.grad = p.grad.flatten()
        one.step()
        adam.step()
    assert torch.equal(p.flatten(), flat)
    for basis in bases(one, p):
        eye = torch.eye(basis.shape[-1]).expand_as(basis)
        torch.testing.assert_close(basis.mT @ basis, eye, rtol=0, atol=5e-6)
        assert (basis.abs() - eye).abs().amax((-2, -1)).min() > 0.1, "it has been refreshed"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_basis_of_a_bad_gradient_does_not_raise(bad: float) -> None:
    basis = eigenbasis(torch.full((3, 5, 5), bad))
    assert torch.equal((basis.mT @ basis).round(decimals=5), torch.eye(5).expand(3, 5, 5))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [  # three dimensions: as experts
        ((96, 96), 24 * 96**2),
        ((40, 24), 8 * 40 * 24 + 8 * (40**2 + 24**2)),
        ((3, 20, 30), 3 * (8 * 20 * 30 + 8 * (20**2 + 30**2))),
        ((10_001, 3), 8 * 10_001 * 3 + 8 * 3**2),
        ((77,), 8 * 77),
        ((), 8),
        ((2, 3, 4, 5), 8 * 120),
    ],
    ids=str,
)
def test_bytes_are_predicted(shape: tuple[int, ...], expected: int) -> None:
    p = nn.Parameter(torch.zeros(shape))
    optimizer = Soap([p], experts=True)
    p.grad = torch.ones(shape)
    optimizer.step()
    assert optimizer_bytes(optimizer) == expected + 8  # and the step
    assert optimizer.state_bytes(p, optimizer.param_groups[0]) == expected + 8


def test_a_matrix_too_large_on_both_sides_takes_adam(monkeypatch: pytest.MonkeyPatch) -> None:
    huge = nn.Parameter(torch.empty(10_001, 20_000, device="meta"))
    optimizer = Soap([huge])
    assert optimizer.state_bytes(huge, optimizer.param_groups[0]) == 8 * huge.numel() + 8
    monkeypatch.setattr(module, "LARGEST_SIDE", 6)
    start = torch.randn(7, 8, generator=torch.Generator().manual_seed(9))
    matrix, vector = nn.Parameter(start.clone()), nn.Parameter(start.flatten())
    both = Soap([matrix, vector], lr=0.01, weight_decay=0.1)
    for step in range(15):
        matrix.grad = gradient((7, 8), step)
        vector.grad = matrix.grad.flatten()
        both.step()
    assert torch.equal(matrix.flatten(), vector)


@pytest.mark.parametrize("value", [1.0, -0.1, "0.9"])
def test_a_bad_shampoo_beta_is_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"shampoo_beta={value!r}"):
        Soap([nn.Parameter(torch.zeros(4, 4))], shampoo_beta=value)
