"""A kernel proves itself at its first use on a GPU, and one that fails is not used: with stand-ins for both.

No GPU is needed: a tensor says that it is on one, cases are made on the CPU whatever device they are asked for, and the
"Triton" of a kernel is a plain function here. One test has a real kernel, in the interpreter, with a bit of it wrong.
"""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_lowmem.kernels import KERNELS, Case, Kernel, compare, proof, registry, use_kernels
from hf_lowmem.kernels.compare import difference
from hf_lowmem.kernels.proof import cache_folder, kind, like, prove

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FACTS = {"device": "a card", "driver": "1.2", "torch": "2.11", "triton": "3.6", "source": "abc"}
calls: list[str] = []


def double(x: Tensor, how: str) -> Tensor:
    return x * 2


def right(x: Tensor, how: str) -> Tensor:
    calls.append("right")
    return x + x


def one_bit_off(x: Tensor, how: str) -> Tensor:
    calls.append("one_bit_off")
    y = x + x
    y.view(torch.int32)[-1] ^= 1
    return y


def not_compiled(x: Tensor, how: str) -> Tensor:
    calls.append("not_compiled")
    raise RuntimeError("PassManager::run failed\n   at 12:4")


def out_of_memory(x: Tensor, how: str) -> Tensor:
    calls.append("out_of_memory")
    raise torch.OutOfMemoryError("no room")


def slow(x: Tensor, how: str) -> Tensor:
    calls.append("slow")
    time.sleep(0.2)
    return x + x


def wrong_when_fast(x: Tensor, how: str) -> Tensor:
    return one_bit_off(x, how) if how == "fast" else right(x, how)


def cases() -> Iterator[Case]:
    for how in ("plain", "fast"):
        yield Case(how, lambda device, how=how: (torch.arange(5.0), how))


def made(triton: Callable[..., Any]) -> Kernel:
    name = f"test_proof_{triton.__name__}"
    return Kernel(name, double, f"{__name__}:{triton.__name__}", fake=lambda x, how: torch.empty_like(x), cases=cases)


MADE = {f.__name__: made(f) for f in (right, one_bit_off, not_compiled, out_of_memory, slow, wrong_when_fast)}


class OnGPU(Tensor):
    """A tensor that says it is on a GPU."""

    device = GPU  # type: ignore[assignment]


ARGS = torch.ones(3).as_subclass(OnGPU), "plain"


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process that has proved nothing yet, with a cache of its own, and a device that can be asked."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(compare, "on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(proof, "_capturing", lambda device: False)
    monkeypatch.setattr(proof, "facts", lambda device: FACTS)
    monkeypatch.setattr(registry, "has_triton", lambda: True)
    new_process(monkeypatch)


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "_proved", set())
    monkeypatch.setattr(proof, "_failed", {})
    calls.clear()


def test_a_right_one_is_compared_once_and_used() -> None:
    for _ in range(3):
        assert MADE["right"].pick(*ARGS) is right
    assert calls == ["right"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("one_bit_off", "on 'plain' it is not what the reference computes, tensor 0: 1 of 5 values differ"),
        ("not_compiled", "it fails with RuntimeError: PassManager::run failed at 12:4"),
    ],
)
def test_a_wrong_one_is_not_used_and_one_warning_says_so(name: str, why: str, caplog: pytest.LogCaptureFixture) -> None:
    kernel = MADE[name]
    assert not kernel.unsupported(*ARGS)
    for _ in range(3):
        assert kernel.pick(*ARGS) is double
    assert calls == [name]
    # Whoever asks before a call, with the tensors that it has, goes another way from now on.
    assert why in kernel.unsupported(ARGS[0])
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    for part in (repr(kernel.name), "a card", why, "several times slower", "hf-lowmem doctor", "HF_LOWMEM_KERNELS"):
        assert part in record.getMessage()


@pytest.mark.parametrize("name", ["one_bit_off", "not_compiled"])
def test_a_wrong_one_that_is_forced_is_an_error(name: str, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        with (
            use_kernels("triton"),
            pytest.raises(RuntimeError, match=f"'test_proof_{name}' is forced to triton, but .*"),
        ):
            MADE[name].pick(*ARGS)
    assert calls == [name]
    assert not caplog.records


def test_nothing_is_compared_where_the_reference_is_asked_for() -> None:
    with use_kernels("reference"):
        assert MADE["one_bit_off"].pick(*ARGS) is double
    assert not calls


def test_each_kind_of_call_is_compared_on_a_case_like_it() -> None:
    kernel = MADE["wrong_when_fast"]
    assert kernel.pick(*ARGS) is wrong_when_fast
    assert kernel.pick(ARGS[0], "fast") is double
    assert kernel.pick(*ARGS) is double, "what fails in one kind is not used in any"


def test_the_case_is_the_first_of_the_kind_or_the_nearest() -> None:
    adamw = KERNELS["adamw_step"]
    for case in list(adamw.cases())[::8]:
        args = case.make(CPU)
        assert kind(like(adamw, kind(args)).make(CPU)) == kind(args)
    args = list(next(iter(KERNELS["quantize"].cases())).make(CPU))
    args[0] = args[0].to(torch.float8_e4m3fn)  # no case has it
    assert like(KERNELS["quantize"], kind(tuple(args))).name.startswith("e4m3 nearest")


def test_another_process_remembers_what_was_proved_and_tries_again_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        assert MADE["slow"].pick(*ARGS) is slow
        assert MADE["one_bit_off"].pick(*ARGS) is double
    assert calls == ["slow", "one_bit_off"]
    [file] = cache_folder().iterdir()
    assert json.loads(file.read_text()) == {"kernel": "test_proof_slow"} | FACTS
    new_process(monkeypatch)
    assert MADE["slow"].pick(*ARGS) is slow
    assert MADE["one_bit_off"].pick(*ARGS) is double
    assert calls == ["one_bit_off"]


@pytest.mark.parametrize("what", list(FACTS))
def test_another_version_or_device_is_compared_again(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MADE["right"].pick(*ARGS)
    new_process(monkeypatch)
    monkeypatch.setattr(proof, "facts", lambda device: FACTS | {what: "another"})
    assert MADE["right"].pick(*ARGS) is right
    assert calls == ["right"]


def test_a_cache_that_cannot_be_written_costs_a_comparison_a_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    for _ in range(2):
        new_process(monkeypatch)
        for _ in range(2):
            assert MADE["right"].pick(*ARGS) is right
        assert calls == ["right"]
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "/a")
    assert cache_folder() == Path("/a/hf_lowmem/kernels")
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folder() == Path("/b/hf_lowmem/kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert cache_folder() == Path("/c/.cache/hf_lowmem/kernels")

    def homeless(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    assert MADE["right"].pick(*ARGS) is right


def test_too_little_memory_says_nothing_of_a_kernel(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        assert MADE["out_of_memory"].pick(*ARGS) is out_of_memory
    assert calls == ["out_of_memory"] * 2
    assert not caplog.records


def test_while_a_graph_is_captured_nothing_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as inside:
        inside.setattr(proof, "_capturing", lambda device: True)
        assert MADE["one_bit_off"].pick(*ARGS) is one_bit_off
    assert not calls
    assert MADE["one_bit_off"].pick(*ARGS) is double


class Refusing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
        raise AssertionError(f"{func} reached the mode")


@contextlib.contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "surroundings",
    [
        lambda: default(torch.bfloat16),
        lambda: torch.device("meta"),
        lambda: torch.inference_mode(),
        lambda: torch.autocast("cpu", torch.bfloat16),
        Refusing,
        FakeTensorMode,
    ],
    ids=["dtype", "device", "inference", "autocast", "mode", "fake"],
)
def test_surroundings_do_not_reach_the_comparison(
    surroundings: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real kernel's reference and cases, which draw, cast and allocate."""
    monkeypatch.setattr(Kernel, "load_triton", lambda self: lambda *args, norm=None: self.reference(*args))
    before = torch.get_rng_state()
    for kernel in (KERNELS["quantize"], KERNELS["lion_step"], KERNELS["apollo_factors"]):
        args = next(iter(kernel.cases())).make(CPU)
        with surroundings():
            dtype = torch.get_default_dtype()
            assert prove(kernel, args, CPU) == ""
            assert torch.get_default_dtype() == dtype
    assert torch.equal(before, torch.get_rng_state())


def test_two_threads_compare_once() -> None:
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(MADE["slow"].pick(*ARGS))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [slow, slow]
    assert calls == ["slow"]


@pytest.mark.parametrize("name", ["right", "one_bit_off"])
def test_compiled_and_fake_calls_go_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared is the operator's own affair: a compiler and a fake mode see one opaque name."""
    monkeypatch.setattr(registry, "_gpu", lambda args: CPU)
    monkeypatch.setattr(Kernel, "unsupported", lambda self, *args: proof.distrusted(self.name, CPU))
    kernel = MADE[name]
    with FakeTensorMode():
        assert kernel(torch.empty(3), "plain").shape == (3,)
    assert not calls
    compiled = torch.compile(lambda x: kernel(x, "plain") + 1, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 3.0))
    assert calls == (["right"] * 3 if name == "right" else ["one_bit_off"])


def test_a_real_kernel_with_a_wrong_bit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter: right as it is, and one code of 384 off by one."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernel = KERNELS["quantize"]
    case = next(case for case in kernel.cases() if case.name == "int8 nearest bfloat16 5x384")
    assert difference(kernel, case, CPU) == ""
    inner = kernel.load_triton()

    def spoilt(*args: Any) -> tuple[Tensor, Tensor]:
        codes, scales = inner(*args)
        codes[3, 100] ^= 1
        return codes, scales

    monkeypatch.setattr(Kernel, "load_triton", lambda self: spoilt)
    assert difference(kernel, case, CPU) == "tensor 0: 1 of 1920 values differ, by 1 at most"


@pytest.mark.parametrize("name", ["adamw_step", "lion_step"])
def test_a_step_proves_every_kernel_that_it_launches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many parameters share launches, one alone has its own; wrong in any of them is found."""
    from hf_lowmem.kernels.step import launch, triton

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernel = KERNELS[name]
    wanted = kind(next(iter(kernel.cases())).make(CPU))
    seen: set[tuple[str, bool, bool]] = set()

    class Watched:
        def __init__(self, name: str) -> None:
            self.name, self.inner = name, getattr(triton, name)

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> None:
                seen.add((self.name, kwargs.get("NORM", False), kwargs.get("EVEN", False)))
                if self.name != spoilt:
                    self.inner[grid](*args, **kwargs)

            return run

    spoilt, all_of = "", ("check_kernel", "check_one_kernel", "step_kernel", "steps_kernel")
    for each in all_of:
        monkeypatch.setattr(launch.jit, each, Watched(each))
    assert proof._compare(kernel, wanted, CPU) == ""
    assert seen == {
        ("check_kernel", False, False), ("steps_kernel", False, False),
        ("check_one_kernel", True, False), ("check_one_kernel", False, False),
        ("step_kernel", False, True), ("step_kernel", False, False),
    }  # fmt: skip
    for each in ("step_kernel", "steps_kernel", "check_kernel"):
        spoilt = each
        assert "not what the reference computes" in proof._compare(kernel, wanted, CPU)


def test_what_differs_is_said() -> None:
    def of(got: Tensor, want: Tensor, bound: float = 0.0) -> str:
        return compare._difference(got, want, bound)

    x, nan = torch.tensor([1.0, -0.0, float("nan")]), float("nan")
    assert of(x, x.clone()) == ""
    assert of(x, torch.tensor([1.0, 0.0, nan])) == "1 of 3 values differ, by 0 at most"
    assert of(x, torch.tensor([nan, -0.0, nan])) == "nan in other places"
    assert of(x, torch.tensor([1.25, 0.0, nan]), 0.25) == ""
    assert of(x, torch.tensor([1.5, 0.0, nan]), 0.25) == "1 of 3 values differ, by 0.5 at most"
    assert of(x, x.double()) == "dtype torch.float32 in place of torch.float64"
    assert of(x, x[:2]) == "shape torch.Size([3]) in place of torch.Size([2])"
    assert of(torch.ones(2, 3).T, torch.ones(3, 2)) == "strides (1, 3) in place of (2, 1)"
