"""Fused steps against the loop of optim/stepping.py: the same weights and states, bit for bit, through whole runs.

The kernels alone, on all their cases, are in test_contract.py; here is what is around them: which parameters take them,
what a bad gradient leaves, checkpoints, hooks. Both sides compute exact square roots (`use_kernels("reference")`), as
those of torch on a CPU are off by a unit in the last place for every sixth value.
"""

import contextlib
import copy
import io
import itertools
import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_lowmem.kernels import Kernel, use_kernels
from hf_lowmem.kernels.adamw import ADAMW_STEP
from hf_lowmem.kernels.adamw.reference import inverse_root, root
from hf_lowmem.kernels.exact import sqrt
from hf_lowmem.kernels.lion import LION_STEP
from hf_lowmem.optim import LowMemOptimizer
from hf_lowmem.optim.backward import StepInBackward
from hf_lowmem.optim.state import number, values_of
from tests.kernels.steps import (
    BAD_STEP,
    CODECS,
    DEVICE,
    STORES,
    assert_same,
    make,
    parameters,
    run,
    same,
    set_gradients,
)

pytestmark = pytest.mark.usefixtures("small_ones_are_compressed")


# The kernels alone have every codec with every store in test_contract.py; around them each is met once, and the
# recommended pair with every store. Lion has nothing of its own there.
SOME = [
    *zip(["adamw"] * 3, CODECS[:3], STORES, strict=True),
    *itertools.product(["adamw"], CODECS[3:], STORES),
    ("lion", CODECS[0], "keep"),
    ("lion", CODECS[3], "bf16_ecc"),
]


@pytest.mark.parametrize(("name", "codec", "store"), SOME, ids=["-".join(case) for case in SOME])
def test_three_steps_with_a_bad_gradient_give_the_bits_of_the_loop(
    name: str, codec: str, store: str, launched: list[int]
) -> None:
    results = []
    for impl in ("reference", "triton"):
        params = parameters(torch.bfloat16)
        results.append(run(name, impl, range(3), torch.bfloat16, params, state=codec, weights=store))
    assert_same(*results)
    # Four in each step: one launch for all of one kind, two kinds where some are too small to be compressed. The
    # strided two and the empty one are left to the loop.
    assert sum(launched) == 12
    assert len(launched) == (3 if codec == "fp32" else 6)


OTHERS = [(torch.float32, None), (torch.float16, None), (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize(
    ("name", "dtype", "grad_dtype"),
    [*(("adamw", *dtypes) for dtypes in OTHERS), ("galore", *OTHERS[2]), ("lion", *OTHERS[1])],
)
def test_other_dtypes(name: str, dtype: torch.dtype, grad_dtype: torch.dtype | None, launched: list[int]) -> None:
    results = []
    for impl in ("reference", "triton"):
        params = parameters(dtype)
        results.append(run(name, impl, range(3), dtype, params, grad_dtype=grad_dtype, state="8bit"))
    assert_same(*results)
    assert sum(launched) == 12


@pytest.mark.parametrize(("name", "store"), [("adamw", "keep"), ("adamw", "bf16_sr"), ("lion", "bf16_ecc")])
def test_a_large_parameter_has_a_launch_of_its_own(name: str, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another kernel than the shared launch's, of the same tile; beside smaller ones that share one."""
    monkeypatch.setattr("hf_lowmem.kernels.step.launch.SMALL", 530)
    results = []
    for impl in ("reference", "triton"):
        params = parameters(torch.bfloat16)[:4]
        params.insert(1, nn.Parameter(params[0].detach().repeat(2, 1)[:41]))  # two tiles, the second one ragged
        results.append(run(name, impl, range(3), torch.bfloat16, params, state="8bit", weights=store))
    assert_same(*results)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9), (0.2, 0.5), (0.0, 0.99)])
@pytest.mark.parametrize("name", ["adamw", "apollo"])
def test_every_beta(name: str, betas: tuple[float, float]) -> None:
    """torch's lerp has two formulas, below and from a weight of 1/2."""
    results = []
    for impl in ("reference", "triton"):
        params = parameters(torch.float32)[1:4]
        results.append(run(name, impl, range(3), torch.float32, params, betas=betas))
    assert_same(*results)


@pytest.mark.parametrize(("name", "store"), [("adamw", "bf16_sr"), ("lion", "bf16_ecc"), ("galore", "keep")])
def test_resumed_in_the_middle_by_the_other(name: str, store: str) -> None:
    """A checkpoint of either implementation is continued by the other as by itself."""
    ends = []
    for impls in (("reference", "reference"), ("reference", "triton"), ("triton", "reference")):
        params = parameters(torch.bfloat16)[:4]
        first = run(name, impls[0], range(2), torch.bfloat16, params, state="8bit", weights=store)
        file = io.BytesIO()
        torch.save({"weights": [p.detach() for p in params], "optimizer": first.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        again = [nn.Parameter(torch.empty_like(p).copy_(w)) for p, w in zip(params, saved["weights"], strict=True)]
        optimizer = make(name, again, state="8bit", weights=store)
        optimizer.load_state_dict(saved["optimizer"])
        ends.append(run(name, impls[1], range(2, 4), torch.bfloat16, again, optimizer))
    for other in ends[1:]:
        assert_same(ends[0], other)


def test_a_bad_first_gradient_leaves_weights_and_zeros() -> None:
    params = parameters(torch.bfloat16)[:3]
    before = [p.detach().clone() for p in params]
    optimizer = run(
        "adamw", "triton", range(BAD_STEP, BAD_STEP + 1), torch.bfloat16, params, state="8bit", weights="bf16_ecc"
    )
    assert torch.equal(params[0], before[0])
    assert torch.equal(params[2], before[2])
    assert not torch.equal(params[1], before[1]), "the others go on"
    for i in (0, 2):
        state = optimizer.state[params[i]]
        assert state["step"] == 1
        assert not any(v.any() for v in values_of(state).values())


def test_step_in_backward_is_the_same() -> None:
    results = []
    for impl, hooked in (("reference", False), ("triton", True)):
        params = parameters(torch.bfloat16)[:4]
        optimizer = make("adamw", params, state="8bit", weights="bf16_sr")
        stepping = StepInBackward(optimizer) if hooked else None
        with use_kernels(impl):
            for step in range(3):
                sum((p.float() * (p.float() + step)).sum() for p in params).backward()  # type: ignore[union-attr]
                optimizer.step()
                optimizer.zero_grad()
        if stepping:
            stepping.remove()
        results.append(optimizer)
    assert_same(*results)


class Operators(TorchDispatchMode):
    """The names of ours that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "hf_lowmem":
            self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_the_operator_is_called_where_somebody_listens_and_else_is_not() -> None:
    """It costs more time than what it calls, so nobody pays for it without need; the bits are the same."""
    results = []
    for listening in (False, True):
        params = parameters(torch.bfloat16)[:4]
        optimizer = run("adamw", "triton", range(1), torch.bfloat16, params, state="8bit", weights="bf16_sr")
        with mock.patch.object(Kernel, "__call__", autospec=True, side_effect=Kernel.__call__) as called:
            with Operators() if listening else contextlib.nullcontext() as seen:
                run("adamw", "triton", range(1, 3), torch.bfloat16, params, optimizer)
            assert called.called == listening
            assert seen is None or seen.names == {"adamw_step"}
        results.append(optimizer)
    assert_same(*results)


def test_autograd_sees_what_a_kernel_wrote() -> None:
    """A weight that a backward pass still needs may not be stepped in silence."""
    params = parameters(torch.bfloat16)[:4]
    loss = sum(p.float().sum() * p.float().sum() for p in params)
    run("adamw", "triton", range(1), torch.bfloat16, params)
    kept = params[1] * params[1]
    run("adamw", "triton", range(1), torch.bfloat16, params)
    loss.backward()  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


def replaced(params: list[nn.Parameter], optimizer: LowMemOptimizer) -> None:
    """Another parameter in its place, as FSDP2 puts it, with the state of the old one."""
    new = nn.Parameter(params[1].detach().clone())
    optimizer.state[new] = optimizer.state.pop(params[1])
    optimizer.param_groups[0]["params"][1] = params[1] = new


def moved(params: list[nn.Parameter], optimizer: LowMemOptimizer) -> None:
    """The same parameter with other memory, as `module.to()` leaves it; a state that was moved, too."""
    params[0].data = params[0].detach().clone()
    state = optimizer.state[params[0]]
    for key, value in state.items():
        state[key] = value.clone()


def loaded(params: list[nn.Parameter], optimizer: LowMemOptimizer) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def loaded_in_place(params: list[nn.Parameter], optimizer: LowMemOptimizer) -> None:
    """As a distributed checkpoint does; the numbers of a state as well, which may have moved to shared memory."""
    for state in optimizer.state.values():
        state["step"].share_memory_().fill_(7)
        state["exp_avg" if "exp_avg" in state else "exp_avg.codes"].zero_()


def other_options(params: list[nn.Parameter], optimizer: LowMemOptimizer) -> None:
    optimizer.param_groups[0] |= {"lr": 0.02, "betas": (0.6, 0.9), "weight_decay": 0.3, "eps": 1e-4}


def another_group(params: list[nn.Parameter], optimizer: LowMemOptimizer) -> None:
    new = nn.Parameter(torch.linspace(-1, 1, 600).to(params[0].dtype))
    optimizer.add_param_group({"params": [("new", new)], "lr": 0.05, "weights": "keep"})
    params.append(new)


def another_store(params: list[nn.Parameter], optimizer: LowMemOptimizer) -> None:
    optimizer.param_groups[0]["weights"] = "keep"


@pytest.mark.parametrize(
    "change", [replaced, moved, loaded, loaded_in_place, other_options, another_group, another_store]
)
@pytest.mark.parametrize("in_backward", [False, True])
def test_nothing_that_was_known_outlives_a_change(change: Any, in_backward: bool) -> None:
    """Between two steps, of the kernel and of the loop."""
    ends = []
    for impl in ("reference", "triton"):
        params = parameters(torch.bfloat16)[:4]
        optimizer = run("adamw", impl, range(2), torch.bfloat16, params, state="8bit", weights="bf16_sr")
        change(params, optimizer)
        with use_kernels(impl):
            for step in range(2, 4):
                set_gradients(params, step)
                for group in optimizer.param_groups if in_backward else ():
                    for p in group["params"]:
                        optimizer.step_param(p, group, norm=None if impl == "reference" else p.grad.float().norm())
                        p.grad = None
                optimizer.step()
        ends.append((params, optimizer))
    for p, q in zip(ends[0][0], ends[1][0], strict=True):
        assert torch.equal(p, q), f"weights of {tuple(p.shape)}"
        assert same(ends[0][1].state[p], ends[1][1].state[q])
    params, optimizer = ends[1]
    assert {int(optimizer.state[p]["step"]) for p in params[:4]} == {9 if change is loaded_in_place else 4}


BAD: dict[str, tuple[Any, Any, int]] = {
    # values put into a gradient, what the norm is said to be (None: what it is), updates that are left out
    "nan": ([math.nan], None, 1),
    "infinite": ([-math.inf], None, 1),
    "too large": ([2e15], None, 1),
    "many, whose norm alone is large": ([1.5e14] * 400, None, 0),
    "squares that overflow": ([1e20, 1.0], None, 1),
    "no norm": ([math.nan], ..., 1),
    "good": ([1.0], None, 0),
}


@pytest.mark.parametrize("case", BAD)
def test_one_parameter_with_the_norm_of_its_gradient(case: str) -> None:
    """A small norm says that all values are good; otherwise they are looked at, with the answer of the loop."""
    size = 5, 901  # two programs look
    values, told, skipped = BAD[case]
    ends = []
    for impl in ("reference", "triton"):
        p = nn.Parameter(torch.linspace(-1, 1, math.prod(size)).view(size).to(torch.bfloat16).to(DEVICE))
        optimizer = make("adamw", [p], state="8bit", weights="bf16_ecc")
        grad = torch.linspace(-1, 1, p.numel(), device=DEVICE)
        grad[-len(values) :] = torch.tensor(values)
        p.grad = grad.view(size).to(p.dtype)
        norm = None if told is ... else torch.linalg.vector_norm(p.grad, dtype=torch.float32)
        with use_kernels(impl):
            optimizer.step_param(p, optimizer.param_groups[0], norm=norm)
            p.grad = None
            optimizer.step()
        assert optimizer.skipped().updates == skipped
        ends.append(optimizer)
    assert_same(*ends)


def test_a_small_norm_spares_the_look_at_the_gradient() -> None:
    """So a norm that is not the gradient's is believed: nothing was read."""
    p = nn.Parameter(torch.ones(40, 30, dtype=torch.bfloat16, device=DEVICE))
    optimizer = make("adamw", [p])
    p.grad = torch.full_like(p, 3e15)
    with use_kernels("triton"):
        optimizer.step_param(p, optimizer.param_groups[0], norm=torch.ones((), device=DEVICE))
        p.grad = None
        optimizer.step()
        assert optimizer.skipped() == (0, 0, 0)


@pytest.mark.parametrize("name", ["adamw", "lion", "apollo", "galore"])
def test_a_strided_gradient_is_put_in_order(name: str, launched: list[int]) -> None:
    """As autograd makes one of a transposed product; the weights are contiguous, so the kernel steps them."""
    ends = []
    for impl in ("reference", "triton"):
        params = parameters(torch.bfloat16)[:2]
        optimizer = make(name, params, state="8bit", weights="bf16_sr")
        with use_kernels(impl):
            for step in range(2):
                grad = torch.randn(25, 23, generator=torch.Generator().manual_seed(step))
                params[0].grad = grad.to(torch.bfloat16).to(DEVICE).T
                assert not params[0].grad.is_contiguous()
                optimizer.step()
        ends.append(optimizer)
    assert_same(*ends)
    assert sum(launched) == 2


@pytest.mark.parametrize("step", [torch.tensor([9]), torch.tensor(9.0), torch.tensor(9, dtype=torch.int32), 9])
def test_a_step_of_somebody_else_s_making_counts_on(step: Any) -> None:
    params = parameters(torch.float32)[:1]
    optimizer = run("adamw", "triton", range(1), torch.float32, params)
    optimizer.state[params[0]]["step"] = step
    run("adamw", "triton", range(2, 4), torch.float32, params, optimizer)
    assert torch.equal(optimizer.state[params[0]]["step"], torch.tensor(11))


def test_automatic_roots_are_torch_s_and_forced_ones_and_those_of_coded_states_exact() -> None:
    x = torch.rand(10_000)
    assert torch.equal(root(x), x.sqrt())
    assert torch.equal(inverse_root(x, 0.0), sqrt(x).reciprocal())
    with use_kernels("reference"):
        assert torch.equal(root(x), sqrt(x))


@pytest.mark.parametrize(("kernel", "name"), [(ADAMW_STEP, "adamw"), (LION_STEP, "lion")])
def test_no_step_asks_the_device_for_a_number(kernel: Kernel, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have no numbers. The operator is called, and a fake of it, which does nothing."""
    monkeypatch.setattr(Kernel, "unsupported", lambda self, *args: "")
    with use_kernels("triton"), FakeTensorMode():
        params = [nn.Parameter(torch.zeros(80, 60)), nn.Parameter(torch.zeros(3))]
        optimizer = make(name, params, state="8bit")
        for _ in range(2):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        assert all(number(state["step"]) == 2 for state in optimizer.state.values())


def test_deepcopied_optimizers_go_on_alike() -> None:
    params = parameters(torch.bfloat16)
    optimizer = run("adamw", "triton", range(1), torch.bfloat16, params, state="8bit", weights="bf16_sr")
    copied = copy.deepcopy(optimizer)
    run("adamw", "triton", range(2, 3), torch.bfloat16, params, optimizer)
    run("adamw", "reference", range(2, 3), torch.bfloat16, copied.param_groups[0]["params"], copied)
    assert_same(optimizer, copied)
