"""Which implementation runs, and what is said when the wanted one cannot."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_lowmem.kernels import KERNELS, Case, Kernel, current_impl, proof, registry, use_kernels
from hf_lowmem.kernels.registry import IMPLS, VARIABLE


def double(x: Tensor) -> Tensor:
    return x * 2


def halve(x: Tensor) -> Tensor:
    """Stands in for the Triton of `double` and is told from it by its result."""
    return x / 2


DOUBLE = Kernel(
    name="test_double",
    reference=double,
    triton=f"{__name__}:halve",
    fake=torch.empty_like,
    supports=lambda x: "x has more than two dimensions" if x.dim() > 2 else "",
)
ONE = torch.ones(1)


def twice(x: Tensor) -> Tensor:
    """Stands in for a CPU's implementation."""
    seen.append(x)
    return x + x


seen: list[Tensor] = []
ON_CPU = Kernel(
    name="test_on_cpu",
    reference=double,
    triton=f"{__name__}:halve",
    cpu=f"{__name__}:twice",
    fake=torch.empty_like,
    cases=lambda: [Case("three", lambda device: (torch.ones(3, device=device),))],
)


@pytest.fixture
def _with_numba(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process that has proved nothing yet, where the compiler is installed."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(proof, "_proved", set())
    monkeypatch.setattr(proof, "_failed", {})
    monkeypatch.setattr(registry, "has_numba", lambda: True)
    seen.clear()


@pytest.mark.usefixtures("_with_numba")
@pytest.mark.parametrize(("impl", "runs"), [("auto", True), ("cpu", True), ("reference", False)])
def test_on_a_cpu_its_own_implementation_runs(impl: str, runs: bool) -> None:
    with use_kernels(impl):
        assert ON_CPU.pick(ONE) is (twice if runs else double)
        assert ON_CPU(ONE).item() == 2.0
    assert len(seen) == (2 if runs else 0), "once on its case, once on the argument"


@pytest.mark.usefixtures("_with_numba")
def test_one_that_differs_on_a_cpu_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(f"{__name__}.twice", halve)
    assert ON_CPU.pick(ONE) is double
    assert "another version of numba may cure it" in caplog.text
    assert ON_CPU.unsupported(ONE)
    with use_kernels("cpu"), pytest.raises(RuntimeError, match="forced to cpu, but on 'three' it is not what"):
        ON_CPU.pick(ONE)


@pytest.mark.usefixtures("_with_numba")
@pytest.mark.parametrize(
    ("kernel", "x", "installed", "reason"),
    [
        (ON_CPU, ONE, False, r"numba is not installed \(pip install 'hf-lowmem\[cpu\]'\)"),
        (ON_CPU, ONE.half(), True, "knows no float16"),
        (ON_CPU, torch.ones(1, device="meta"), True, "not all on a CPU"),
        (DOUBLE, ONE, True, "has no implementation for a CPU but its reference"),
    ],
)
def test_what_a_cpu_cannot_run_is_said(
    kernel: Kernel, x: Tensor, installed: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "has_numba", lambda: installed)
    assert kernel.pick(x) is double
    with use_kernels("cpu"), pytest.raises(RuntimeError, match=f"is forced to cpu, but .*{reason}.*{VARIABLE}"):
        kernel.pick(x)


def test_the_table_is_keyed_by_the_operators_names() -> None:
    assert KERNELS
    for name, kernel in KERNELS.items():
        assert kernel.name == name
        assert getattr(torch.ops.hf_lowmem, name).default is kernel.op._opoverload


@pytest.mark.parametrize("impl", IMPLS)
def test_either_way_of_asking_is_heard(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(registry, "has_numba", lambda: False)
    want = {"triton": 0.5, "cpu": None}.get(impl, 2.0)
    with use_kernels(impl):
        assert current_impl() == impl
        assert result() == want
    assert current_impl() == "auto"
    monkeypatch.setenv(VARIABLE, impl)
    assert result() == want


def result() -> float | None:
    """What DOUBLE makes of one, None where it is refused."""
    try:
        return DOUBLE(ONE).item()
    except RuntimeError:
        return None


def test_the_inner_block_wins_and_an_error_ends_it() -> None:
    with use_kernels("reference"):
        with use_kernels("triton"):
            assert current_impl() == "triton"
        with pytest.raises(KeyError), use_kernels("triton"):
            raise KeyError
        assert current_impl() == "reference"
    assert current_impl() == "auto"


def test_the_interpreter_runs_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert DOUBLE(ONE).item() == 2.0


@pytest.mark.parametrize(
    ("x", "interpret", "installed", "reason"),
    [
        (ONE, "0", True, "on a CPU, where Triton runs in its interpreter only"),
        (ONE, "1", False, "triton is not installed"),
        (torch.ones(1, 1, 1), "1", True, "x has more than two dimensions"),
        (torch.ones(1, device="meta"), "1", True, "does not run on meta"),
    ],
)
def test_triton_that_cannot_run_is_an_error_that_says_why(
    x: Tensor, interpret: str, installed: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    monkeypatch.setattr(registry, "has_triton", lambda: installed)
    assert DOUBLE.pick(x) is double  # "auto" takes the reference, without a word
    with (
        use_kernels("triton"),
        pytest.raises(RuntimeError, match=f"'test_double' is forced to triton.*{reason}.*{VARIABLE}"),
    ):
        DOUBLE.pick(x)


@pytest.mark.parametrize(
    ("asked", "error", "match"),
    [("tritn", ValueError, "'tritn' is not available. Did you mean 'triton'"), (None, TypeError, "expected a string")],
)
def test_an_unknown_implementation_is_named(asked: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=f"impl=.*{match}"), use_kernels(asked):
        pass
    assert current_impl() == "auto"


def test_an_unknown_value_of_the_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(ValueError, match=f"{VARIABLE}='cuda' is not available"):
        DOUBLE(ONE)


def test_a_mode_sees_one_operator_whichever_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    class Seen(TorchDispatchMode):
        names: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    for impl in IMPLS:
        with use_kernels(impl), Seen() as mode:
            mode.names.clear()
            with contextlib.suppress(RuntimeError):
                DOUBLE(ONE)
            assert mode.names == ["hf_lowmem.test_double.default"]
