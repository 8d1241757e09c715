"""What the low-rank methods promise with every projection: resume, batches, bytes, rotation, accumulation."""

import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem.codecs import CODECS, codec_pair
from hf_lowmem.memory import optimizer_bytes
from hf_lowmem.optim import OPTIMIZERS, slot
from hf_lowmem.optim.base import LowMemOptimizer
from hf_lowmem.optim.lowrank.apollo import Apollo, ApolloMini
from hf_lowmem.optim.lowrank.family import LowRankOptimizer
from hf_lowmem.optim.lowrank.fira import Fira
from hf_lowmem.optim.lowrank.galore import GaLore
from hf_lowmem.optim.lowrank.natural_galore import NaturalGaLore
from hf_lowmem.optim.lowrank.pipeline import rotate_first, rotate_second
from hf_lowmem.optim.lowrank.projector import SubspaceProjector, basis_shape, projected_shape
from hf_lowmem.optim.state import WINDOW
from tests.peers.gradients import gradient, start

METHODS: dict[str, type[LowRankOptimizer]] = {m.name: m for m in (GaLore, Fira, NaturalGaLore, Apollo, ApolloMini)}
PROJECTS_BACK = [name for name, cls in METHODS.items() if cls.PROJECTS_BACK]
TABLE = [(n, p, r) for n, p, r in itertools.product(METHODS, ("svd", "subspace", "random"), (False, True))]
TABLE = [(n, p, r) for n, p, r in TABLE if not r or (n in PROJECTS_BACK and p != "random")]
combinations = pytest.mark.parametrize(("name", "projection", "rotate"), TABLE, ids=str)

SHAPE = (72, 64)


def make(name: str, params: Any, projection: str, rotate: bool = False, **options: Any) -> LowRankOptimizer:
    kwargs: dict[str, Any] = {"lr": 0.01, "rank": 4, "update_gap": 3, "projection": projection} | options
    if rotate:
        kwargs["rotate"] = True
    return METHODS[name](params, **kwargs)


def run(optimizer: LowMemOptimizer, p: Tensor, steps: range) -> None:
    for step in steps:
        p.grad = gradient(tuple(p.shape), step).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("codec", ["fp32", "8bit"])
@combinations
def test_save_load_continue_is_uninterrupted(name: str, projection: str, rotate: bool, codec: str) -> None:
    p = nn.Parameter(start(SHAPE))
    optimizer = make(name, [p], projection, rotate, state=codec)
    run(optimizer, p, range(5))
    file = io.BytesIO()
    torch.save((p.detach(), optimizer.state_dict()), file)
    file.seek(0)
    weight, saved = torch.load(file, weights_only=True)
    q = nn.Parameter(weight.clone())
    resumed = make(name, [q], projection, rotate, state=codec)
    resumed.load_state_dict(saved)
    run(optimizer, p, range(5, 11))
    run(resumed, q, range(5, 11))
    assert torch.equal(p, q)


@combinations
def test_a_batch_is_its_matrices_one_by_one(name: str, projection: str, rotate: bool) -> None:
    for shape in ((3, 20, 30), (3, 30, 20)):
        p = nn.Parameter(start(shape))
        run(make(name, [("w", p)], projection, rotate), p, range(8))
        grads = [gradient(shape, step) for step in range(8)]
        for i, single in enumerate(start(shape)):
            q = nn.Parameter(single.clone())
            alone = make(name, [("w", q)], projection, rotate)
            for grad in grads:
                q.grad = grad[i].clone()
                alone.step()
            torch.testing.assert_close(p[i], q, rtol=0, atol=1e-5)  # sums in another order, over 8 steps of at most 0.1


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "8bit"])
@pytest.mark.parametrize("projection", ["svd", "subspace", "random"])
@pytest.mark.parametrize("name", METHODS)
def test_bytes_are_those_of_the_formula(name: str, projection: str, codec: str) -> None:
    (m, n), rank = SHAPE, 4
    p = nn.Parameter(start(SHAPE))
    optimizer = make(name, [p], projection, state=codec)
    run(optimizer, p, range(2))
    signed, unsigned = codec_pair(codec)
    expected = signed.nbytes(rank * m, signed=True) + unsigned.nbytes(rank * m, signed=False)
    expected += signed.nbytes(rank * n, signed=True) if projection != "random" else 0
    expected += signed.nbytes(4 * rank * m, signed=True) if name == "natural_galore" else 0
    expected += 4 if name in ("fira", "apollo", "apollo_mini") else 0
    expected += 8 + 8 * (projection != "svd" or codec != "fp32")  # the step, and where random numbers start
    assert optimizer_bytes(optimizer) == optimizer.state_bytes(p, optimizer.param_groups[0]) == expected


@combinations
def test_a_first_gradient_that_is_bad_costs_one_step(
    name: str, projection: str, rotate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the same steps are taken on a device that is not asked whether it was bad."""
    results = []
    for syncs in (True, False):
        monkeypatch.setattr(slot, "reads_are_free", lambda device, syncs=syncs: syncs)
        p = nn.Parameter(start(SHAPE))
        optimizer = make(name, [p], projection, rotate, update_gap=100)
        p.grad = torch.full(SHAPE, torch.nan)
        optimizer.step()
        assert torch.equal(p, start(SHAPE))
        run(optimizer, p, range(1, 2))
        assert not torch.equal(p, start(SHAPE)), "the basis is made from the second"
        run(optimizer, p, range(2, 6))
        results.append(p.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("name", PROJECTS_BACK)
def test_an_exact_projection_of_a_low_rank_gradient_loses_nothing(name: str) -> None:
    """Where all gradients lie in one space of the projection's rank, any basis of it gives the same step."""
    weights = []
    for projection in ("svd", "subspace"):
        p = nn.Parameter(start(SHAPE))
        optimizer = make(name, [p], projection, rank=2, update_gap=100)
        for step in range(4):
            p.grad = gradient((SHAPE[0], 2), step) @ start((2, SHAPE[1]))
            optimizer.step()
        kept = optimizer.state[p]["basis"]
        weights.append((p.detach() - start(SHAPE), kept))
    for moved, kept in weights:
        inside = moved @ kept @ kept.mT
        assert (moved - inside).norm() <= 1e-4 * moved.norm(), "steps stay in the space of the gradients"


def orthonormal(d: int, r: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(d, r, generator=torch.Generator().manual_seed(seed)))[0]


@pytest.mark.parametrize("right", [True, False])
def test_moments_follow_a_basis_that_only_changes_its_coordinates(right: bool) -> None:
    """Same space, columns reordered and flipped: both moments are exact."""
    old = orthonormal(30, 4)
    order = torch.tensor([2, 0, 3, 1])
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0])
    rotation = old.mT @ (old[:, order] * signs)
    m, v = start((50, 4)), start((50, 4)).square()
    first = rotate_first(m if right else m.mT, rotation, right)
    second = rotate_second(v if right else v.mT, rotation, right)
    torch.testing.assert_close(first if right else first.mT, m[:, order] * signs, rtol=0, atol=1e-5)
    torch.testing.assert_close(second if right else second.mT, v[:, order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("right", [True, False])
def test_the_first_moment_projected_back_survives_a_rotation_inside_the_space(right: bool) -> None:
    old = orthonormal(30, 4)
    new = old @ orthonormal(4, 4, seed=1)
    m = start((50, 4))
    turned = rotate_first(m if right else m.mT, old.mT @ new, right)
    torch.testing.assert_close((turned if right else turned.mT) @ new.mT, m @ old.mT, rtol=0, atol=1e-5)


@pytest.mark.parametrize("right", [True, False])
def test_a_rotated_second_moment_lies_within_the_channel_s_old_values(right: bool) -> None:
    """So it is never negative, nor smaller than anything Adam has seen there, even for a basis that is all new."""
    for seed in range(1, 5):
        rotation = orthonormal(30, 4).mT @ orthonormal(30, 4, seed=seed)
        v = start((50, 4)).square()
        turned = rotate_second(v if right else v.mT, rotation, right)
        turned = turned if right else turned.mT
        assert (turned >= v.amin(1, keepdim=True) * (1 - 1e-5)).all()
        assert (turned <= v.amax(1, keepdim=True) * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", PROJECTS_BACK)
def test_a_new_basis_of_the_same_space_changes_no_step_if_the_moments_turn(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A constant gradient, and a refresh that reorders and flips columns. Without rotation the step is thrown about."""
    find = SubspaceProjector.find

    def other_coordinates(self: SubspaceProjector, grad: Tensor, old: Tensor, usable: Tensor) -> Tensor:
        return old.flip(-1) * torch.tensor([1.0, -1.0]) if old.any() else find(self, grad, old, usable)

    monkeypatch.setattr(SubspaceProjector, "find", other_coordinates)
    jumps = {}
    for rotate in (False, True):
        p = nn.Parameter(torch.zeros(SHAPE))
        optimizer = make(name, [p], "subspace", rotate, rank=2, update_gap=8, lr=1.0)
        steps = []
        for _ in range(9):
            before = p.detach().clone()
            p.grad = start((SHAPE[0], 2)) @ orthonormal(SHAPE[1], 2).mT
            optimizer.step()
            steps.append(p.detach() - before)
        jumps[rotate] = ((steps[8] - steps[7]).norm() / steps[7].norm()).item()
    # Rounding lets 1e-7 of a channel's mean into each second moment, which shows where one coordinate of the gradient
    # is a thousandth of the other: a few of 144.
    assert jumps[True] < 0.05
    assert jumps[False] > 0.5


@pytest.mark.parametrize("projection", ["svd", "subspace", "random"])
@pytest.mark.parametrize("name", ["galore", "natural_galore"])
def test_projections_are_added_up_as_gradients_would_be(name: str, projection: str) -> None:
    """Between refreshes exactly, as a projection is linear; at a refresh the first gradient makes the basis."""
    p, q = (nn.Parameter(start(SHAPE)) for _ in range(2))
    accumulated = make(name, [("w", p)], projection, update_gap=100)
    whole = make(name, [("w", q)], projection, update_gap=100)
    for step in range(4):
        parts = [gradient(SHAPE, 3 * step + i) for i in range(3)]
        if step == 0:
            parts[1:] = [0 * parts[0]] * 2  # a sum that has the first gradient's basis
        for part in parts[:-1]:
            p.grad = part
            assert accumulated.accumulate_param(p, accumulated.param_groups[0])
        assert WINDOW in accumulated.state[p]
        p.grad = parts[-1]
        accumulated.step()
        assert WINDOW not in accumulated.state[p]
        q.grad = torch.stack(parts).sum(0)
        whole.step()
    # Sums of 72 products in another order, through 4 steps of at most 0.01 each.
    torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_what_needs_whole_gradients_does_not_add_up(name: str) -> None:
    p, small = nn.Parameter(start(SHAPE)), nn.Parameter(start((8,)))
    optimizer = make(name, [p, small], "subspace")
    p.grad, small.grad = gradient(SHAPE, 0), gradient((8,), 0)
    assert optimizer.accumulate_param(p, optimizer.param_groups[0]) == (name in ("galore", "natural_galore"))
    assert not optimizer.accumulate_param(small, optimizer.param_groups[0]), "no projection, no saving"


def test_a_bad_gradient_inside_a_window_leaves_no_trace() -> None:
    p, q = (nn.Parameter(start(SHAPE)) for _ in range(2))
    disturbed, other = make("galore", [p], "subspace"), make("galore", [q], "subspace")
    for optimizer, weight in ((disturbed, p), (other, q)):
        run(optimizer, weight, range(3))
        if optimizer is disturbed:  # at a refresh
            weight.grad = torch.full(SHAPE, torch.inf)
            assert optimizer.accumulate_param(weight, optimizer.param_groups[0])
            weight.grad = gradient(SHAPE, 3)
        else:
            weight.grad = torch.full(SHAPE, torch.inf)
        optimizer.step()
        run(optimizer, weight, range(4, 9))
    assert torch.equal(p, q)


def test_rotation_of_random_bases_is_refused() -> None:
    with pytest.raises(ValueError, match="rotate=True has no effect with projection='random'"):
        make("galore", [nn.Parameter(start(SHAPE))], "random", rotate=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"damping": 0}, ValueError, r"damping=0: must be a finite number in \(0, inf\)"),
        ({"damping": "big"}, TypeError, "damping='big': expected a number"),
        ({"history": 0}, ValueError, "history=0: must be at least 1"),
        ({"history": 2.5}, TypeError, "history=2.5: expected an integer"),
    ],
    ids=str,
)
def test_bad_options_of_natural_galore_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        NaturalGaLore([nn.Parameter(start(SHAPE))], **options)


def test_a_bad_option_of_fira_is_named() -> None:
    with pytest.raises(TypeError, match="authors_residual='yes': expected True or False"):
        Fira([nn.Parameter(start(SHAPE))], authors_residual="yes")


def test_a_history_of_another_length_cannot_be_continued() -> None:
    p = nn.Parameter(start(SHAPE))
    saved = make("natural_galore", [p], "svd", history=2)
    run(saved, p, range(1))
    with pytest.raises(ValueError, match="made with history=2, this optimizer has history=4"):
        make("natural_galore", [nn.Parameter(start(SHAPE))], "svd").load_state_dict(saved.state_dict())


def test_shapes_of_basis_and_projection() -> None:
    assert basis_shape(torch.Size([5, 30, 20]), 4) == (5, 20, 4)
    assert projected_shape(torch.Size([30, 20]), 4) == (30, 4)
    assert projected_shape(torch.Size([20, 30]), 4) == (4, 30)


@pytest.mark.parametrize("codec", [*CODECS, "8bit"])
@pytest.mark.parametrize("shape", [(1024, 2816), (2816, 1024), (2048, 2048), (1000, 333)], ids=str)
def test_apollo_keeps_no_projection(shape: tuple[int, int], codec: str) -> None:
    """s * 2rD + 64 bytes, Mini 2 * s * D + 64, where s is the codec's bytes a value and D the larger side."""
    p = nn.Parameter(torch.zeros(shape))
    for name, rank in (("apollo", 128), ("apollo_mini", 1)):
        optimizer = OPTIMIZERS[name]([p], rank=rank, state=codec)
        values = rank * max(shape)
        first, second = codec_pair(codec if p.numel() >= 4096 else "fp32")
        promised = first.nbytes(values, signed=True) + second.nbytes(values, signed=False) + 64
        assert optimizer.state_bytes(p, optimizer.param_groups[0]) <= promised


@pytest.mark.parametrize(("codec", "most"), [("fp8_expand", 2.10), ("8bit", 2.10), ("int8", 2.05), ("int4", 1.10)])
def test_adamw_bytes_a_parameter(codec: str, most: float) -> None:
    p = nn.Parameter(torch.zeros(1024, 2816))
    optimizer = OPTIMIZERS["adamw"]([p], state=codec)
    assert optimizer.state_bytes(p, optimizer.param_groups[0]) / p.numel() <= most
