"""Nothing that is not finite reaches a weight or a state, and what was left out is counted."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from hf_lowmem.kernels import registry, use_kernels
from hf_lowmem.optim import OPTIMIZERS, LowMemOptimizer, slot
from hf_lowmem.optim.guard import SkipCount, Skipped
from hf_lowmem.optim.soap import eigenbasis
from hf_lowmem.optim.state import COUNTS

DEVICES = pytest.mark.parametrize("syncs", [True, False], ids=["cpu", "as on a device"])
SHAPE = (80, 64)


@pytest.fixture(autouse=True)
def _as_on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = request.node.callspec.params.get("syncs", True) if hasattr(request.node, "callspec") else True
    monkeypatch.setattr(slot, "reads_are_free", lambda device: syncs)


def make(name: str, dtype: torch.dtype = torch.float32, **kwargs: Any) -> tuple[nn.Parameter, LowMemOptimizer]:
    p = nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype))
    defaults = OPTIMIZERS[name].DEFAULTS
    settings: dict[str, Any] = {k: v for k, v in {"rank": 4, "update_gap": 3}.items() if defaults.get(k, 0) > v}
    if name == "scale":  # which keeps nothing of other matrices
        settings["role"] = "head"
    merged: dict[str, Any] = {"lr": 0.01} | settings | kwargs
    return p, OPTIMIZERS[name]([("w", p)], **merged)


def step(p: nn.Parameter, optimizer: LowMemOptimizer, seed: int, factor: float = 1.0) -> None:
    p.grad = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * factor).to(p.dtype)
    optimizer.step()


def values(p: nn.Parameter, optimizer: LowMemOptimizer) -> dict[str, torch.Tensor]:
    state = {k: v for k, v in optimizer.state[p].items() if k not in COUNTS}
    return copy.deepcopy(state | {"weight": p.detach()})


@pytest.mark.parametrize(("syncs", "bad"), [(True, math.nan), (False, math.inf)], ids=["cpu", "as on a device"])
@pytest.mark.parametrize("what", ["weight", "exp_avg"])
@pytest.mark.parametrize("codec", ["fp32", "8bit"])
@pytest.mark.parametrize("name", [n for n, cls in OPTIMIZERS.items() if not cls.ELEMENTWISE])
def test_an_update_that_is_not_finite_is_taken_back(
    name: str, codec: str, what: str, bad: float, syncs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "has_numba", lambda: False)  # a kernel calls no `update`
    p, optimizer = make(name, state=codec)
    for seed in range(3):
        step(p, optimizer, seed)
    before = values(p, optimizer)
    update = type(optimizer).update

    def broken(self: Any, weights: Any, grad: Any, state: Any, group: Any) -> None:
        save = state.save

        def spoiled(key: str, value: torch.Tensor) -> None:
            if key == what:
                value.view(-1)[-1] = bad
            save(key, value)

        state.save = spoiled
        update(self, weights, grad, state, group)
        del state.save
        if what == "weight":
            weights.view(-1)[-1] = bad

    with monkeypatch.context() as patch:
        patch.setattr(type(optimizer), "update", broken)
        step(p, optimizer, 3)
    after = values(p, optimizer)
    assert after.keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in after.items())
    assert optimizer.skipped() == (1, 1, 1)
    step(p, optimizer, 4)
    assert not torch.equal(p, before["weight"])
    assert optimizer.skipped() == (1, 1, 0)


@DEVICES
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("codec", ["fp32", "8bit"])
def test_a_state_that_is_not_finite_spoils_no_weight(name: str, codec: str, syncs: bool) -> None:
    p, optimizer = make(name, state=codec)
    step(p, optimizer, 0)
    floats = [v for k, v in optimizer.state[p].items() if k not in COUNTS and v.is_floating_point()]
    for v in floats:
        v.view(-1)[0] = torch.nan
    before = p.detach().clone()
    step(p, optimizer, 1)
    assert torch.equal(p, before)
    assert optimizer.skipped().updates == 1


@DEVICES
@pytest.mark.parametrize("name", ["adamw", "lion", "lamb", "soap", "apollo", "galore"])
def test_fp16_weights_do_not_become_infinite(name: str, syncs: bool) -> None:
    p, optimizer = make(name, torch.float16, lr=1e7)
    for seed in range(3):
        step(p, optimizer, seed)
    assert p.isfinite().all()
    assert optimizer.skipped().updates > 0


@DEVICES
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("settings", [{"eps": 1e-60}, {"lr": 1e36}], ids=str)
def test_settings_at_the_end_of_fp32(name: str, settings: dict[str, Any], syncs: bool) -> None:
    if "eps" in settings and "eps" not in OPTIMIZERS[name].DEFAULTS:
        pytest.skip("it has no eps")
    p, optimizer = make(name, **settings)
    for seed in range(3):
        step(p, optimizer, seed, factor=0.0 if seed else 1e-30)
    assert p.isfinite().all()
    assert all(v.float().isfinite().all() for v in values(p, optimizer).values())


@pytest.mark.parametrize("lr", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("name", ["adamw", "apollo", "soap"])
def test_a_learning_rate_that_is_no_number_is_refused(name: str, tensor: bool, lr: float) -> None:
    p, optimizer = make(name)
    optimizer.param_groups[0]["lr"] = torch.tensor(lr) if tensor else lr
    before = p.detach().clone()
    with pytest.raises(ValueError, match=f"lr={lr}.*No step was made"):
        step(p, optimizer, 0)
    assert torch.equal(p, before)


def low_rank_factors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    rows = torch.zeros(100, 64)
    rows[torch.randint(0, 100, (20,), generator=g)] = torch.randn(20, 64, generator=g)
    thin = torch.randn(64, 3, generator=g)
    return {
        "zero rows": rows @ rows.T,
        "zero rows, the other side": rows.T @ rows,
        "zero": torch.zeros(64, 64),
        "rank 3": thin @ thin.T,
        "tiny": 1e-36 * thin @ thin.T,
        "huge": 1e29 * thin @ thin.T,
        "one value": torch.diag(torch.eye(64)[3]),
        "a batch": torch.stack([thin @ thin.T, torch.zeros(64, 64), torch.eye(64)]),
    }


@pytest.mark.parametrize("syncs", [True, False])
@pytest.mark.parametrize("kind", low_rank_factors())
def test_an_eigenbasis_is_one_whatever_the_factor(kind: str, syncs: bool) -> None:
    basis = eigenbasis(low_rank_factors()[kind], syncs=syncs)
    eye = torch.eye(basis.shape[-1]).expand_as(basis)
    torch.testing.assert_close(basis.mT @ basis, eye, rtol=0, atol=1e-5)


@pytest.mark.parametrize("syncs", [True, False])
def test_an_eigenbasis_survives_a_solver_that_returns_nan(syncs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    factor = low_rank_factors()["rank 3"]
    real = torch.linalg.eigh

    def broken(x: torch.Tensor) -> Any:
        found = real(x)
        if x.dtype == torch.float32:
            found.eigenvectors.fill_(torch.nan)
        return found

    right = eigenbasis(factor)
    monkeypatch.setattr(torch.linalg, "eigh", broken)
    basis = eigenbasis(factor, syncs=syncs)
    if syncs:
        top = (basis[:, :3].T @ right[:, :3]).abs()
        torch.testing.assert_close(top, torch.eye(3), rtol=0, atol=1e-3)
    else:
        assert torch.equal(basis, torch.eye(64))


@DEVICES
@pytest.mark.parametrize("shape", [(100, 64), (64, 100), (300, 32), (257, 31)], ids=str)
def test_soap_trains_an_embedding(shape: tuple[int, int], syncs: bool) -> None:
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        p = nn.Parameter(torch.randn(shape, generator=g))
        optimizer = OPTIMIZERS["soap"]([("emb", p)], lr=1e-3, update_gap=2)
        before = p.detach().clone()
        for _ in range(5):
            p.grad = torch.zeros(shape)
            rows = torch.randint(0, shape[0], (20,), generator=g)
            p.grad[rows] = torch.randn(20, shape[1], generator=g)
            optimizer.step()
        assert p.isfinite().all()
        assert (p - before).abs().max() > 1e-3
        assert optimizer.skipped() == (0, 0, 0)


@DEVICES
@pytest.mark.parametrize("name", ["adamw", "soap", "apollo", "galore"])
def test_what_is_left_out_is_counted_and_survives_a_checkpoint(name: str, syncs: bool) -> None:
    p, optimizer = make(name)
    q = nn.Parameter(torch.zeros(SHAPE))
    optimizer.add_param_group({"params": [("v", q)]})
    assert "skipped" not in optimizer.state_dict()["param_groups"][0]
    for seed, factor in enumerate((1.0, math.nan, math.nan, 1.0, math.inf)):
        q.grad = torch.ones_like(q)
        step(p, optimizer, seed, factor)
    assert optimizer.skipped() == Skipped(updates=3, steps=3, in_a_row=1)
    for _ in range(2):
        q.grad = torch.full_like(q, math.nan)
        step(p, optimizer, 5, math.nan)
    assert optimizer.skipped() == Skipped(updates=7, steps=5, in_a_row=3)
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["param_groups"][0]["skipped"] == [7, 5, 3]
    again, resumed = make(name)
    resumed.add_param_group({"params": [("v", nn.Parameter(torch.zeros(SHAPE)))]})
    resumed.load_state_dict(saved)
    assert resumed.skipped() == (7, 5, 3)
    step(again, resumed, 6, math.nan)
    assert resumed.skipped() == (8, 6, 4)
    del saved["param_groups"][0]["skipped"]  # of 0.1.0, or of a run that left nothing out
    resumed.load_state_dict(saved)
    assert resumed.skipped() == (0, 0, 0)


def test_steps_are_counted_across_devices() -> None:
    skips = SkipCount(Skipped(2, 1, 1))
    good, bad = torch.tensor(True), torch.tensor(False)
    for here, there in ((bad, good), (good, bad), (good, good), (bad, bad)):
        skips.add(here, syncs=True)
        skips.add(there, syncs=False)
        skips.end_step()
    assert skips.read() == (6, 4, 1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_float64_weights_keep_their_precision(name: str) -> None:
    start = torch.tensor([[1 / 3, 1 / 7], [0.1, 1e-300]], dtype=torch.float64)
    p = nn.Parameter(start.clone())
    optimizer = OPTIMIZERS[name]([p], lr=0.0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(p, start)
    wide, narrow = make(name, torch.float64), make(name)
    for seed in range(5):
        step(*wide, seed)
        step(*narrow, seed)
    assert wide[0].dtype == torch.float64
    assert (wide[0] != wide[0].float().double()).any(), "more than fp32 has"
    torch.testing.assert_close(wide[0].float(), narrow[0], rtol=1e-4, atol=1e-5)
    optimizer = copy.deepcopy(wide[1].state_dict())
    wide[1].load_state_dict(optimizer)
    step(*wide, 6)


@pytest.mark.parametrize("name", ["adamw", "soap", "apollo"])
def test_dtypes_that_cannot_be_trained_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match=r"float8_e4m3fn.*Load the model in"):
        OPTIMIZERS[name]([nn.Parameter(torch.zeros(4, 4).to(torch.float8_e4m3fn))])
    frozen = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    OPTIMIZERS[name]([frozen, nn.Parameter(torch.zeros(4, 4))])


@pytest.mark.parametrize("impl", ["reference", "triton", "cpu"])
@pytest.mark.parametrize("name", ["apollo", "apollo_mini"])
def test_a_rate_that_would_overflow_weights_moves_none(name: str, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel has no weights to go back to, so it must know before."""
    if impl == "cpu":
        pytest.importorskip("numba", reason="numba, of the extra `cpu`, compiles the CPU's kernels")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    p, optimizer = make(name, state="8bit")
    with use_kernels(impl):
        step(p, optimizer, 0)
        before = values(p, optimizer)
        optimizer.param_groups[0]["lr"] = 3e38
        step(p, optimizer, 1, factor=1e3)
        after = values(p, optimizer)
        assert all(torch.equal(v, before[k]) for k, v in after.items())
        assert optimizer.skipped() == (1, 1, 1)
        optimizer.param_groups[0]["lr"] = 0.01
        step(p, optimizer, 2)
    assert not torch.equal(p, before["weight"])
    assert p.isfinite().all()
