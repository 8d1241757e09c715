"""What a projection promises: orthonormal, close to the best, made of finite gradients only, small in the state."""

import math
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowmem.codecs import codec_pair
from hf_lowmem.optim import slot
from hf_lowmem.optim.lowrank.family import LowRankOptimizer
from hf_lowmem.optim.lowrank.projector import (
    COLD_STEPS,
    PROJECTORS,
    Projector,
    RandomProjector,
    gaussian,
    power_basis,
    svd_basis,
)
from hf_lowmem.optim.state import count

SHAPES = [(40, 24), (24, 40), (31, 7), (3, 20, 36), (2, 36, 20)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decaying(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """A matrix whose singular values fall like 1, 0.8, 0.64, ..."""
    u, s, vh = torch.linalg.svd(normal(*shape, seed=seed), full_matrices=False)
    return (u * 0.8 ** torch.arange(s.shape[-1])) @ vh


def energy(grad: Tensor, basis: Tensor) -> Tensor:
    """Share of the squared norm that the projection keeps, one number a matrix."""
    low = grad @ basis if grad.shape[-2] >= grad.shape[-1] else basis.mT @ grad
    return low.square().sum((-2, -1)) / grad.square().sum((-2, -1))


def distance_from_orthonormal(basis: Tensor) -> float:
    return (basis.mT @ basis - torch.eye(basis.shape[-1])).abs().max().item()


class Stepper:
    """A projector's life: one state, a projector for each step."""

    def __init__(
        self, projection: str, *, rank: int = 4, gap: int = 3, codec: str = "fp32", projects_back: bool = True
    ) -> None:
        self.raw: dict[str, Any] = {"key": count(42)}
        self.group = {"rank": rank, "update_gap": gap, "projection": projection, "state": codec, "weights": "keep"}
        self.cls, self.projects_back = PROJECTORS[projection], projects_back
        self.rotation: Tensor | None = None
        self.syncs = True

    def __call__(self, grad: Tensor, step: int) -> Projector:
        mine = slot.Slot(grad, self.group, {"basis": LowRankOptimizer.STATES["basis"]})
        mine.open(self.raw)
        mine.syncs = self.syncs
        projector = self.cls(grad, mine, self.group, step, projects_back=self.projects_back)
        self.rotation = projector.refresh_(grad)
        return projector


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("projection", ["svd", "subspace"])
def test_a_basis_is_orthonormal_and_projects_there_and_back(projection: str, shape: tuple[int, ...]) -> None:
    grad = decaying(shape)
    projector = Stepper(projection)(grad, 0)
    tall = shape[-2] >= shape[-1]
    assert projector.basis.shape == (*shape[:-2], min(shape[-2:]), 4)
    assert distance_from_orthonormal(projector.basis) < 1e-5  # 40 products of fp32 numbers below 1 round to 40 * 2**-24
    low = projector.project(grad)
    assert low.shape == ((*shape[:-1], 4) if tall else (*shape[:-2], 4, shape[-1]))
    assert projector.project_back(low).shape == shape
    torch.testing.assert_close(projector.project(projector.project_back(low)), low, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_svd_keeps_the_most_that_can_be_kept(shape: tuple[int, ...]) -> None:
    grad = decaying(shape)
    best = 0.8 ** (2 * torch.arange(min(shape[-2:])))
    expected = best[:4].sum() / best.sum()
    torch.testing.assert_close(energy(grad, svd_basis(grad, 4)), expected.expand(shape[:-2]), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("shape", "rank"), [((64, 48), 12), ((48, 64), 12), ((128, 352), 32)], ids=str)
def test_subspace_keeps_nearly_as_much(shape: tuple[int, int], rank: int) -> None:
    """Of gradients that change by 3 % from one refresh to the next, 99.9 % of SVD's energy after two."""
    stepper = Stepper("subspace", rank=rank, gap=1)
    drift = normal(*shape, seed=1)
    for step in range(3):
        grad = decaying(shape)
        grad = grad + 0.03 * step * drift * grad.norm() / drift.norm()
        kept = energy(grad, stepper(grad, step).basis) / energy(grad, svd_basis(grad, rank))
    assert kept >= 0.999


def test_the_first_power_steps_from_a_gaussian_are_good_at_once() -> None:
    """Also where singular values fall slowly, as those of a real gradient do behind the first ones: like 1 / i."""
    u, s, vh = torch.linalg.svd(normal(96, 128), full_matrices=False)
    grad = (u / torch.arange(1.0, len(s) + 1)) @ vh
    found = power_basis(grad, gaussian(7, 96, 16, grad.device), COLD_STEPS)
    assert energy(grad, found) / energy(grad, svd_basis(grad, 16)) >= 0.99


def test_a_column_stays_near_the_one_it_came_from() -> None:
    """QR leaves signs open; flipped ones would turn a moment that is not rotated against the gradient."""
    stepper = Stepper("subspace", rank=6, gap=1)
    before = stepper(decaying((40, 24)), 0).basis.clone()
    for step in range(1, 4):
        after = stepper(decaying((40, 24)) + 0.02 * step * normal(40, 24, seed=step) / 30, step).basis
        assert ((before * after).sum(0) > 0.9).all()
        before = after.clone()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e14])
@pytest.mark.parametrize("projection", ["svd", "subspace"])
def test_the_size_of_a_gradient_does_not_matter(projection: str, scale: float) -> None:
    grad = decaying((40, 24))
    basis = Stepper(projection)(grad * scale, 0).basis
    assert distance_from_orthonormal(basis) < 1e-5
    assert energy(grad, basis) >= 0.99 * energy(grad, svd_basis(grad, 4))


@pytest.mark.parametrize("projection", ["svd", "subspace"])
def test_a_gradient_of_lower_rank_than_the_basis_will_do(projection: str) -> None:
    grad = normal(40, 2) @ normal(2, 24, seed=1)
    basis = Stepper(projection)(grad, 0).basis
    assert distance_from_orthonormal(basis) < 1e-5
    assert energy(grad, basis) > 1 - 1e-5


def test_a_new_basis_is_made_at_each_gap_and_not_between() -> None:
    for projection in ("svd", "subspace"):
        stepper, seen = Stepper(projection, gap=5), []
        for step in range(16):
            seen.append(stepper(normal(40, 24, seed=step), step).basis.clone())
            assert (stepper.rotation is not None) == (step % 5 == 0)
        changed = [step for step in range(1, 16) if not torch.equal(seen[step], seen[step - 1])]
        assert changed == [5, 10, 15]


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, 3e38], ids=str)
@pytest.mark.parametrize("projection", ["svd", "subspace"])
def test_a_bad_gradient_makes_no_basis(projection: str, bad: float) -> None:
    """One matrix of a batch has nothing to make a basis of: it keeps what it has, its neighbour is not disturbed."""
    stepper, alone = Stepper(projection, gap=4), Stepper(projection, gap=4)
    good = normal(2, 40, 24)
    spoilt = good.clone()
    spoilt[1] = bad
    first = stepper(spoilt, 0).basis.clone()
    assert torch.equal(first[1], torch.zeros(24, 4)), "none yet"
    torch.testing.assert_close(first[0], alone(good, 0).basis[0])
    second = stepper(good, 1).basis.clone()
    assert torch.equal(second[0], first[0])
    assert distance_from_orthonormal(second[1]) < 1e-5, "made as soon as there was something to make it of"
    later = normal(2, 40, 24, seed=3)
    later[1] = bad
    fifth = stepper(later, 4).basis
    assert torch.equal(fifth[1], second[1]), "kept"
    assert not torch.equal(fifth[0], second[0])
    assert stepper.rotation is not None
    torch.testing.assert_close(stepper.rotation[1], torch.eye(4), msg="a kept basis turns no moment")


@pytest.mark.parametrize("syncs", [True, False])
@pytest.mark.parametrize("projection", ["svd", "subspace"])
def test_a_missing_basis_is_looked_for_ever_more_rarely(projection: str, syncs: bool) -> None:
    stepper = Stepper(projection, gap=100)
    stepper.syncs = syncs
    tried = []
    for step in range(20):
        stepper(torch.zeros(40, 24), step)
        trial = Stepper(projection, gap=100)
        trial.raw = dict(stepper.raw)
        trial.raw["basis"] = stepper.raw["basis"].clone()
        trial.syncs = syncs
        if trial(normal(40, 24), step).basis.any():
            tried.append(step)
    assert tried == [0, 1, 2, 4, 8, 16]


def test_a_basis_that_is_there_is_not_made_again_where_the_answer_costs_something() -> None:
    """On an asynchronous device the result of a needless search is dropped."""
    results = []
    for syncs in (True, False):
        stepper = Stepper("subspace", gap=20)
        stepper.syncs = syncs
        results.append([stepper(normal(40, 24, seed=step), step).basis.clone() for step in range(25)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(results[0][0], results[0][19])


@pytest.mark.parametrize("projection", ["svd", "subspace"])
def test_the_rotation_leads_from_the_old_basis_to_the_new(projection: str) -> None:
    stepper = Stepper(projection, gap=1)
    old = stepper(normal(3, 40, 24), 0).basis.clone()
    assert stepper.rotation is not None
    assert torch.equal(stepper.rotation, torch.eye(4).expand(3, 4, 4)), "nothing to rotate at first"
    new = stepper(normal(3, 40, 24, seed=1), 1).basis
    torch.testing.assert_close(stepper.rotation, old.mT @ new)


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "fp8", "fp8_expand"])
def test_every_step_uses_the_basis_as_it_is_stored(codec: str) -> None:
    stepper = Stepper("subspace", gap=10, codec=codec)
    grad = normal(80, 64)
    first = stepper(grad, 0).basis.clone()
    for step in range(1, 4):
        assert torch.equal(stepper(grad, step).basis, first)
    assert all(isinstance(v, Tensor | int) for v in stepper.raw.values())
    stored = sum(v.nbytes for k, v in stepper.raw.items() if k.startswith("basis"))
    assert stored == codec_pair(codec)[0].nbytes(64 * 4, signed=True)


def test_random_keeps_nothing_and_draws_the_same_again() -> None:
    stepper, other = Stepper("random", gap=3), Stepper("random", gap=3)
    drawn = [stepper(normal(40, 24), step).basis for step in range(7)]
    assert all(torch.equal(p, other(normal(40, 24, seed=1), step).basis) for step, p in enumerate(drawn))
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[2], drawn[3])
    assert stepper.raw == {"key": 42}


@pytest.mark.parametrize("shape", [(900, 800), (800, 900)], ids=str)
def test_random_projections_have_the_size_that_the_docstring_says(shape: tuple[int, int]) -> None:
    grad, small, rank = normal(*shape), 800, 32
    projecting, reading = (Stepper("random", rank=rank, projects_back=back)(grad, 0) for back in (True, False))
    assert isinstance(projecting, RandomProjector)
    # A mean over 900 channels of chi-squared variables with 32 degrees of freedom is off by 0.8 %; five times that.
    assert reading.project(grad).square().sum() / grad.square().sum() == pytest.approx(1, rel=0.04)
    assert projecting.project(grad).square().sum() / grad.square().sum() == pytest.approx(rank / small, rel=0.04)
    values = torch.linalg.svdvals(projecting.basis @ projecting.basis.mT)[:rank]
    spread = math.sqrt(rank / small)
    # The edges of the spectrum fluctuate by about small**(-2/3), a hundredth.
    assert (1 - spread) ** 2 - 0.03 < values.min()
    assert values.max() < (1 + spread) ** 2 + 0.03
    direction = torch.sign(projecting.project(grad))
    assert projecting.project_back(direction).norm() / direction.norm() == pytest.approx(1, rel=0.04)


@pytest.mark.slow
def test_subspace_refreshes_ten_times_as_fast_as_svd() -> None:
    """Both in one run, on the shape that the docstring names; processor time, as other processes may be running."""
    grad = normal(1024, 2816)
    medians = {}
    for projection in ("subspace", "svd"):
        stepper = Stepper(projection, rank=256, gap=1)
        stepper(grad, 0)
        times = []
        for step in range(1, 4):
            moved = grad + 0.1 * normal(1024, 2816, seed=step)
            begin = time.process_time()
            stepper(moved, step)
            times.append(time.process_time() - begin)
        medians[projection] = sorted(times)[1]
    print({k: round(v, 3) for k, v in medians.items()}, "ratio", round(medians["svd"] / medians["subspace"], 1))
    assert medians["svd"] >= 10 * medians["subspace"]


@pytest.mark.parametrize(("small", "rank"), [(3, 1), (9, 4), (64, 16), (65, 256), (5, 3), (40, 8)])
def test_a_basis_is_torch_s_standard_normal_numbers_over_the_root_of_the_rank(small: int, rank: int) -> None:
    """Whichever way it is drawn: for as long as a state lasts its basis is drawn anew from the same seed."""
    for key in (0, 2**62 + 5):
        generator = torch.Generator().manual_seed(key)
        want = torch.randn(small, rank, generator=generator).div_(math.sqrt(rank))
        assert torch.equal(gaussian(key, small, rank, torch.device("cpu")), want)
