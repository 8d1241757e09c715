"""What every kernel of KERNELS promises, on every one of its cases.

On a machine without a CUDA device Triton runs in its interpreter (tests/conftest.py), on one with it for real.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime import JITFunction
from triton.runtime.interpreter import InterpretedFunction

from hf_lowmem.kernels import KERNELS, Case, Kernel, use_kernels
from hf_lowmem.kernels.registry import has_numba

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def dtypes(args: Any) -> set[torch.dtype]:
    """Those of a call's tensors, and those that it names."""
    return {t.dtype for t in tensors(args)} | {arg for arg in args if isinstance(arg, torch.dtype)}


def marked(kernel: Kernel) -> Iterator[Any]:
    """The kernel's cases. In the interpreter a large one takes three seconds: of a kernel's the first is enough."""
    large = [case.name for case in kernel.cases() if case.name.startswith("large")]
    for case in kernel.cases():
        slow = DEVICE.type == "cpu" and case.name in large[1:]
        yield pytest.param(kernel, case, id=f"{kernel.name}-{case.name}", marks=[pytest.mark.slow] if slow else [])


ALL = [param for kernel in KERNELS.values() for param in marked(kernel)]
ON_CPU = [
    pytest.param(kernel, case, id=f"{kernel.name}-{case.name}")
    for kernel in KERNELS.values()
    if kernel.cpu
    for case in kernel.cases()
    if not dtypes(case.make(CPU)) & {torch.float16, torch.float64}  # left to the reference
]
FEW = [
    pytest.param(kernel, cases[at], id=f"{name}-{cases[at].name}")
    for name, kernel in KERNELS.items()
    for cases in [list(kernel.cases())]
    for at in sorted({0, len(cases) // 2, len(cases) - 1})
]


@pytest.fixture(autouse=True)
def _fresh_memory_holds_nan() -> Iterator[None]:
    """torch.empty gives nan, or the largest integer, so an element that nobody wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each launch was given by name, as they come."""
    seen: list[dict[str, Any]] = []
    for kind in (JITFunction, InterpretedFunction):
        run = kind.run

        def recording(self: Any, *args: Any, run: Any = run, **options: Any) -> Any:
            seen.append(options)
            return run(self, *args, **options)

        monkeypatch.setattr(kind, "run", recording)
    return seen


def written(kernel: Kernel, args: tuple[Any, ...]) -> list[Tensor]:
    """The tensors that a call writes in place, in the order of its arguments."""
    names = [a.name for a in kernel.op._opoverload._schema.arguments]
    return tensors([arg for name, arg in zip(names, args, strict=True) if name in kernel.mutates])


def assert_same_bits(got: Tensor, want: Tensor, what: str) -> None:
    assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride()), what
    if want.is_floating_point():
        # All nans are one: which of them an operation makes differs by device.
        assert torch.equal(got.isnan(), want.isnan()), what
        got, want = (t.masked_fill(t.isnan(), 0).contiguous().view(-1).view(torch.uint8) for t in (got, want))
    differ = got != want
    assert not differ.any(), f"{what}: {differ.sum()} of {differ.numel()} differ"


def assert_within(got: Tensor, want: Tensor, bound: Tensor | float, what: str) -> None:
    assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride()), what
    assert torch.equal(got.isnan(), want.isnan()), what
    excess = (got.double() - want.double()).abs() - bound
    assert not (excess > 0).any(), f"{what}: {excess.max()} beyond the bound"


@pytest.mark.parametrize(("kernel", "case"), ALL)
def test_triton_gives_the_reference(kernel: Kernel, case: Case, launches: list[dict[str, Any]]) -> None:
    """And would on a GPU: the interpreter never fuses a product into a sum; it is seen to that no launch lets a GPU."""
    assert_gives_the_reference(kernel, case, "triton", DEVICE)
    assert all(options.get("enable_fp_fusion") is False for options in launches)


@pytest.mark.train
@pytest.mark.skipif(not has_numba(), reason="numba is not installed: pip install 'hf-lowmem[cpu]'")
@pytest.mark.parametrize(("kernel", "case"), ON_CPU)
def test_the_cpu_gives_the_reference(kernel: Kernel, case: Case) -> None:
    assert_gives_the_reference(kernel, case, "cpu", CPU)


def assert_gives_the_reference(kernel: Kernel, case: Case, impl: str, device: torch.device) -> None:
    """The same bits, or within the kernel's own bound; in fresh results and in what is written in place."""
    by_reference, by_impl, before = (case.make(device) for _ in range(3))
    with use_kernels("reference"):
        want = tensors(kernel(*by_reference)) + written(kernel, by_reference)
    with use_kernels(impl):
        got = tensors(kernel(*by_impl)) + written(kernel, by_impl)
    assert len(got) == len(want) > 0
    bounds = [0.0] * len(want) if kernel.bound is None else list(kernel.bound(*before))
    for i, (g, w, bound) in enumerate(zip(got, want, bounds, strict=True)):
        what = f"{kernel.name}, {case.name}, tensor {i}"
        if isinstance(bound, float) and bound == 0.0:
            assert_same_bits(g, w, what)
        else:
            assert_within(g, w, bound, what)

    mutable = {t.data_ptr() for args in (by_reference, by_impl) for t in written(kernel, args)}
    for args in (by_reference, by_impl):
        for t, was in zip(tensors(args), tensors(before), strict=True):
            if t.data_ptr() not in mutable:
                assert_same_bits(t, was, f"{kernel.name}, {case.name}: an argument that only is read")


def kind(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """All of a call that the shapes and strides of its results may hang on: sizes and values are left out."""

    def of(arg: Any) -> Any:
        if isinstance(arg, Tensor):
            last = arg.shape[-1] if arg.dim() else 1
            return arg.dtype, arg.dim(), arg.numel() == 0, arg.is_contiguous(), last % 128 == 0, last % 32 == 0
        if isinstance(arg, list):
            return tuple(map(of, arg))
        return arg if arg is None or isinstance(arg, str | bool | torch.dtype) else type(arg)

    return tuple(map(of, args))


@pytest.mark.parametrize("kernel", [pytest.param(k, id=name) for name, k in KERNELS.items()])
def test_shapes_are_known_without_data(kernel: Kernel) -> None:
    for case in {kind(case.make(DEVICE)): case for case in kernel.cases()}.values():
        args = case.make(DEVICE)
        want = tensors(kernel(*args))
        with FakeTensorMode() as mode:
            got = tensors(kernel(*tree_map(lambda a, m=mode: m.from_tensor(a) if isinstance(a, Tensor) else a, args)))
        described = [[(t.shape, t.dtype, t.stride(), t.device) for t in ts] for ts in (got, want)]
        assert described[0] == described[1], case.name


@pytest.mark.parametrize(("kernel", "case"), FEW)
def test_the_operator_is_a_good_one(kernel: Kernel, case: Case) -> None:
    """torch's own checks: what the schema says of mutation and aliasing, autograd, fake tensors, dynamic shapes."""
    torch.library.opcheck(kernel.op, case.make(DEVICE))


@pytest.mark.parametrize(("kernel", "case"), FEW[1::3])
def test_compiles_in_one_graph(kernel: Kernel, case: Case) -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda *args: kernel(*args), fullgraph=True, backend="aot_eager")
    eager, args = case.make(DEVICE), case.make(DEVICE)
    want, got = tensors(kernel(*eager)), tensors(compiled(*args))
    for g, w in zip(got + tensors(args), want + tensors(eager), strict=True):
        assert_same_bits(g, w, case.name)


@pytest.mark.parametrize("kernel", [pytest.param(k, id=name) for name, k in KERNELS.items()])
def test_cases_have_names_of_their_own_and_repeat(kernel: Kernel) -> None:
    cases = list(kernel.cases())
    assert cases
    assert len({case.name for case in cases}) == len(cases)
    for one, two in zip(tensors(cases[0].make(DEVICE)), tensors(cases[0].make(DEVICE)), strict=True):
        assert one.data_ptr() != two.data_ptr() or not one.numel()
        assert_same_bits(one, two, cases[0].name)
