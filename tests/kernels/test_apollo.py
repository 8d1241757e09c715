"""APOLLO by its kernels against the loop of optim/stepping.py. The kernels on all their cases: test_contract.py.

The norms of both are sums in another order. Where the loop is given the kernels' factors, the rest is the same bits.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_lowmem.kernels import Kernel, use_kernels
from hf_lowmem.kernels.apollo import APOLLO_FACTORS, UNIT
from hf_lowmem.kernels.apollo.reference import apollo_factors, apollo_update, growth_, update_by_factors
from hf_lowmem.kernels.registry import has_numba
from hf_lowmem.optim import OPTIMIZERS, LowMemOptimizer, slot
from hf_lowmem.optim.lowrank import together
from hf_lowmem.optim.lowrank.projector import gaussian
from hf_lowmem.optim.state import number, values_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = ((40, 23), (23, 40), (2, 12, 9), (30,))  # channels by row, by column, a batch; Adam
BAD_STEP = 1
STORES = ("keep", "bf16_sr", "bf16_ecc")
each_method = pytest.mark.parametrize("name", ["apollo", "apollo_mini"])


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype).to(DEVICE)) for shape in SHAPES]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator) * 0.1
        if step == BAD_STEP and i in (0, 2):
            grad.view(-1)[-1] = float("nan") if i == 0 else -2e15
        p.grad = grad.to(p.dtype).to(p.device)


def run(
    name: str, impl: str, params: list[nn.Parameter], after: Callable[[], None] = lambda: None, **settings: Any
) -> LowMemOptimizer:
    names = [f"p{i}" for i in range(len(params))]
    rank = {"rank": 4} if name == "apollo" else {}
    optimizer = OPTIMIZERS[name](list(zip(names, params, strict=True)), lr=0.01, weight_decay=0.1, **rank, **settings)
    with use_kernels(impl):
        for step in range(3):
            set_gradients(params, step)
            optimizer.step()
            after()
    return optimizer


def update_by_the_kernel_s_factors(
    impl: str,
    grad: Tensor,
    projected: Tensor,
    direction: Tensor,
    prev_norm: Tensor,
    *,
    per_channel: bool,
    scale: float,
) -> Tensor:
    finite = torch.ones(1, dtype=torch.int32, device=grad.device)
    with use_kernels(impl):
        s, factors, norms = APOLLO_FACTORS(
            [grad], projected[None], direction[None], finite, [prev_norm], per_channel, 1.0
        )
    prev_norm.copy_(norms[0])
    return update_by_factors(grad, s[0], factors[0], scale)


def assert_same(
    one: tuple[list[nn.Parameter], LowMemOptimizer], other: tuple[list[nn.Parameter], LowMemOptimizer]
) -> None:
    """Weights, states, and what was left out."""
    for p, q in zip(one[0], other[0], strict=True):
        assert torch.equal(p, q)
        ours, theirs = one[1].state[p], other[1].state[q]
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert torch.equal(value, theirs[key]) if isinstance(value, Tensor) else value == theirs[key], key
    assert one[1].skipped() == other[1].skipped()


# One factor for a channel or for the whole matrix is the kernel's affair: APOLLO-Mini has each store and each way once.
MINI = zip(["apollo_mini"] * 3, STORES, (True, False, True), strict=True)


@pytest.mark.parametrize(("name", "store", "waits"), [*itertools.product(["apollo"], STORES, (True, False)), *MINI])
def test_all_but_the_norms_is_the_same_bits(
    name: str, store: str, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps, a bad gradient in the second: skipped where the device may be asked, else passed to the kernel."""
    update = functools.partial(update_by_the_kernel_s_factors, "triton")
    monkeypatch.setattr("hf_lowmem.optim.lowrank.apollo.apollo_update", update)
    results = []
    for impl in ("reference", "triton"):
        if impl == "triton":
            monkeypatch.setattr(slot, "reads_are_free", lambda device: waits)
        params = parameters(torch.bfloat16)
        results.append((params, run(name, impl, params, weights=store)))
    assert_same(*results)


NUMBA = pytest.mark.skipif(not has_numba(), reason="numba is not installed: pip install 'hf-lowmem[cpu]'")
IMPLS = ["triton", pytest.param("cpu", marks=NUMBA)]


@pytest.mark.usefixtures("small_ones_are_compressed")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("state", ["8bit", "fp32,fp8_expand"])
def test_encoded_moments_are_the_same_bits(impl: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    update = functools.partial(update_by_the_kernel_s_factors, impl)
    monkeypatch.setattr("hf_lowmem.optim.lowrank.apollo.apollo_update", update)
    results = []
    for name in ("reference", impl):
        params = parameters(torch.bfloat16)
        results.append((params, run("apollo", name, params, weights="bf16_sr", state=state)))
    assert any(v.dtype == torch.uint8 for state in results[0][1].state.values() for v in values_of(state).values())
    assert_same(*results)


@each_method
def test_the_norms_are_within_their_bound(name: str) -> None:
    """Gradients do not depend on the weights and moments not on norms: only what is done with the factors differs.

    An update is off by e in proportion at most, e the bound of s and of the factor, and by that of the norm that limits
    it, which has come through every step so far: after three, 6 e of the way that a weight went. Each weight has its
    own roundings, two a step and no more than 2.1 units of it in all in either.
    """
    paths = []
    for impl in ("reference", "triton"):
        params = parameters(torch.float32)
        path = [[p.detach().clone() for p in params]]
        run(
            name, impl, params, after=lambda params=params, path=path: path.append([p.detach().clone() for p in params])
        )
        paths.append(path)
    for i in range(len(SHAPES)):
        ours, theirs = (torch.stack([weights[i] for weights in path]).double() for path in paths)
        way = ours.diff(dim=0).abs().sum(0)
        # A unit of the norm over m * n values, of s and of their quotients: kernels/apollo/__init__.py.
        e = 2 * UNIT * (1.5 * ours[0].numel() + 20)
        assert (way > 0).all()
        assert ((ours[-1] - theirs[-1]).abs() <= 6 * e * way + 2 * 3 * 2.1 * UNIT * ours.abs().amax(0)).all()


def test_a_bad_first_gradient_leaves_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot, "reads_are_free", lambda device: False)
    params = parameters(torch.bfloat16)
    before = [p.detach().clone() for p in params]
    optimizer = OPTIMIZERS["apollo"](params, lr=0.1, rank=4, weights="bf16_ecc")
    set_gradients(params, BAD_STEP)
    with use_kernels("triton"):
        optimizer.step()
    for i, (p, old) in enumerate(zip(params, before, strict=True)):
        assert torch.equal(p, old) == (i in (0, 2))
        if i in (0, 2):
            assert not any(v.any() for v in values_of(optimizer.state[p]).values())


def test_growth_is_limited_to_a_hundredth() -> None:
    last = torch.tensor([0.0, 1.0, 1.0, 1.0])
    norm = torch.tensor([7.0, 0.5, 1.0, 3.0])
    factor = growth_(norm, last)
    torch.testing.assert_close(last, torch.tensor([7.0, 0.5, 1.0, 1.01]), rtol=4 * 2.0**-23, atol=0)
    torch.testing.assert_close(norm / factor, last, rtol=0, atol=0)


def test_the_update_is_the_rescaled_gradient() -> None:
    grad = torch.tensor([[1.0, -2.0], [4.0, 0.5]])
    got = update_by_factors(grad, torch.tensor([[2.0], [3.0]]), torch.tensor(4.0), 9.0)
    assert torch.equal(got, torch.tensor([[1.5, -3.0], [9.0, 1.125]]))


@pytest.mark.parametrize("per_channel", [True, False])
def test_both_ways_to_the_update_are_one(per_channel: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    grad, projected, direction = (torch.randn(2, 9, n, generator=generator) for n in (7, 3, 3))
    last = torch.tensor([0.0, 1.0])
    whole = apollo_update(grad, projected, direction, last.clone(), per_channel=per_channel, scale=3.0)
    finite = torch.ones(1, dtype=torch.int32)
    s, factors, _ = apollo_factors([grad], projected[None], direction[None], finite, [last], per_channel, 1.0)
    assert torch.equal(update_by_factors(grad, s[0], factors[0], 3.0), whole)


def test_no_step_asks_the_device_for_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kernel, "unsupported", lambda self, *args: "")
    monkeypatch.setattr(slot, "reads_are_free", lambda device: False)
    with use_kernels("triton"), FakeTensorMode():
        params = [nn.Parameter(torch.zeros(80, 60)), nn.Parameter(torch.zeros(3))]
        optimizer = OPTIMIZERS["apollo"](params, lr=0.01, rank=4)
        for _ in range(2):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        assert all(number(state["step"]) == 2 for state in optimizer.state.values())


ALIKE = [(40, 23)] * 3 + [(12, 50)] * 2


@pytest.mark.usefixtures("small_ones_are_compressed")
@pytest.mark.parametrize(("impl", "store"), [("triton", "bf16_ecc"), pytest.param("cpu", "keep", marks=NUMBA)])
def test_a_matrix_has_the_same_bits_in_any_company(impl: str, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a shape in a call, two in a call, and one by one as in a step in backward."""
    monkeypatch.setattr("tests.kernels.test_apollo.SHAPES", ALIKE)
    results = []
    for values, alone in ((1 << 24, False), (2 * 40 * 4, False), (1 << 24, True)):
        monkeypatch.setattr(together, "VALUES", values)
        params = parameters(torch.bfloat16)
        optimizer = OPTIMIZERS["apollo"](
            [(f"p{i}", p) for i, p in enumerate(params)], lr=0.01, rank=4, state="8bit", weights=store
        )
        with use_kernels(impl):
            for step in range(2):
                set_gradients(params, step)
                if alone:
                    for p in reversed(params):
                        optimizer.step_param(p, optimizer.param_groups[0])
                        p.grad = None
                optimizer.step()
        results.append((params, optimizer))
    assert results[0][1].skipped() == (2, 1, 1)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@pytest.mark.parametrize("impl", IMPLS)
def test_an_update_that_would_not_be_finite_leaves_all(impl: str) -> None:
    """A rate of 1e37 takes a weight beyond fp32; a projection of 1e30 has no square. The last step is a good one."""
    params = parameters(torch.float32)[:3]
    optimizer = OPTIMIZERS["apollo"]([(f"p{i}", p) for i, p in enumerate(params)], lr=0.01, rank=4)
    before = [p.detach().clone() for p in params]
    with use_kernels(impl):
        for rate, size in ((1e37, 1.0), (0.01, 3e14)):
            optimizer.param_groups[0] |= {"lr": rate, "betas": (0.9, 0.0 if size > 1 else 0.999)}
            set_gradients(params, 0)
            for p in params:
                assert p.grad is not None
                p.grad.mul_(size)
            with mock.patch("hf_lowmem.optim.lowrank.projector.gaussian", big_gaussian if size > 1 else gaussian):
                optimizer.step()
        for p, old in zip(params, before, strict=True):
            assert torch.equal(p, old)
            assert not any(v.any() for v in values_of(optimizer.state[p]).values())
        assert optimizer.skipped() == (6, 2, 2)
        set_gradients(params, 0)
        optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(params, before, strict=True))
    assert optimizer.skipped() == (6, 2, 0)


def big_gaussian(key: int, small: int, rank: int, device: torch.device) -> Tensor:
    return gaussian(key, small, rank, device).mul_(1e16)
