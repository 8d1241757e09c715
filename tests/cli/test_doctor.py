"""`hf-lowmem doctor`: what it prints, what it returns, and that it needs neither triton nor trl nor a GPU."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lowmem.cli.doctor import surroundings, trial
from hf_lowmem.cli.doctor.trial import device_of_trials
from hf_lowmem.cli.main import main
from hf_lowmem.kernels import KERNELS, Kernel
from hf_lowmem.kernels.large import bytes_moved, large
from hf_lowmem.kernels.registry import has_numba

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four cases each of two kernels in the interpreter: one of bits and one with a bound."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    few = {}
    for name in ("rmsnorm", "apollo_factors"):
        few[name] = copy.copy(KERNELS[name])
        object.__setattr__(few[name], "cases", lambda cases=KERNELS[name].cases: list(cases())[:4])
    monkeypatch.setattr(trial, "KERNELS", few)


def spoil(name: str, spoilt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Kernel.load_triton
    monkeypatch.setattr(Kernel, "load_triton", lambda self: spoilt(load(self)) if self.name == name else load(self))


def row_of(text: str, name: str) -> list[str]:
    return next(line for line in text.splitlines() if line.startswith(f"{name} ")).split(maxsplit=2)


def test_kernels_that_are_right(two: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert row_of(text, "rmsnorm")[1] == "4"
    assert row_of(text, "rmsnorm")[2].split() == ["yes", "-", "-"]
    assert "within its bound" in row_of(text, "apollo_factors")[2]
    assert "All 2 kernels are what their references are." in text
    assert "Compared in Triton's interpreter" in text
    for part in (f"torch {torch.__version__}", "GiB free", "HF_LOWMEM_KERNELS: auto", "hf_lowmem/kernels"):
        assert part in text


def test_kernels_that_differ_or_fail(
    two: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def one_bit(run: Any) -> Any:
        def spoilt(*args: Any) -> Any:
            results = run(*args)
            if results[0].shape == (3, 256):
                results[0].view(torch.int16)[0, 0] ^= 1
            return results

        return spoilt

    def failing(run: Any) -> Any:
        def spoilt(*args: Any) -> Any:
            raise ValueError("at 12:4:\n  no such type")

        return spoilt

    spoil("rmsnorm", one_bit, monkeypatch)
    spoil("apollo_factors", failing, monkeypatch)
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    norm, factors = found["kernels"]["rows"]
    assert found["kernels"]["same"] is False
    assert set(norm["wrong"]) == {case.name for case in KERNELS["rmsnorm"].cases() if case.name.startswith("(3, 256)")}
    assert all(why.startswith("tensor 0: 1 of 768 values differ") for why in norm["wrong"].values())
    assert set(factors["wrong"].values()) == {"ValueError: at 12:4: no such type"}
    assert len(factors["wrong"]) == factors["cases"] == 4

    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert row_of(text, "rmsnorm")[2].startswith("NO: 3 differ")
    assert "apollo_factors, 37x19-channels-float32: ValueError: at 12:4: no such type" in text
    assert "apollo_factors: and 1 more (--json has all)" in text
    assert "its reference runs, slower" in text


@pytest.mark.parametrize(
    ("interpret", "installed", "gpu", "numba", "where", "sentence"),
    [
        ("0", True, False, False, None, "no kernel can be run on a device"),
        ("0", True, False, False, None, "pip install 'hf-lowmem[cpu]'"),
        ("0", False, False, False, None, "triton is not installed"),
        ("1", False, True, False, None, "triton is not installed"),
        ("1", True, True, True, "cpu", "in Triton's interpreter"),
        ("0", True, True, True, "cuda:1", "Compared on a card."),
        ("0", True, False, True, "cpu", "compiled by numba"),
        ("1", False, False, True, "cpu", "compiled by numba"),
    ],
)
def test_where_kernels_are_tried(
    interpret: str,
    installed: bool,
    gpu: bool,
    numba: bool,
    where: str | None,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trial, "has_numba", lambda: numba)
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    monkeypatch.setattr(trial, "has_triton", lambda: installed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    device, said = device_of_trials()
    assert device == (where and torch.device(where))
    assert sentence in said


def test_what_is_missing_or_old_says_what_it_costs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = {"transformers": "4.57.1", "torch": "2.13.0", "accelerate": "1.15.0+local", "triton": "3.10.0"}

    def version(name: str) -> str:
        if name not in here:
            raise surroundings.PackageNotFoundError(name)
        return here[name]

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(surroundings, "version", version)
    monkeypatch.setattr(trial, "has_numba", lambda: False)
    needs = ["transformers>=5.17", "accelerate>=1.15", 'triton>=3.6; sys_platform == "linux"', "datasets"]
    monkeypatch.setattr(surroundings, "requires", lambda name: needs)
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kernels"] == {"where": None, "note": device_of_trials()[1], "same": True, "rows": []}
    packages = found["packages"]
    assert packages["trl"] == {"version": "", "needs": "", "costs": surroundings.PACKAGES["trl"]}
    assert packages["transformers"]["costs"].startswith("older than 5.17")
    assert packages["accelerate"]["costs"] == packages["triton"]["costs"] == ""
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert row_of(text, "peft") == ["peft", "-", "no LoRA and other adapters"]


@pytest.mark.train
@pytest.mark.skipif(not has_numba(), reason="numba is not installed: pip install 'hf-lowmem[cpu]'")
def test_on_a_cpu_its_own_kernels_are_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["on a CPU runs"] == "kernels compiled by numba"
    assert found["settings"]["lowmem_matmul"] == "runs on a CPU by references, slower than plain products"
    rows = found["kernels"]["rows"]
    assert {row["kernel"] for row in rows} == {name for name, kernel in KERNELS.items() if kernel.cpu}
    assert all(row["cases"] > 0 and not row["wrong"] for row in rows)


@pytest.mark.train
def test_it_needs_no_triton_no_trl_and_no_host() -> None:
    missing = ("triton", "numba", "trl", "transformers", "accelerate", "peft", "datasets", "bitsandbytes", "rich")
    code = (
        f"import sys\nsys.modules |= dict.fromkeys({missing!r})\nfrom hf_lowmem.cli.main import main\n"
        "assert main(['doctor']) == 0\nprint('loaded', *(m for m in sys.modules if sys.modules[m] is not None))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "triton is not installed, so there are no kernels to compare" in done.stdout
    assert not set(done.stdout.split("loaded")[1].split()) & set(missing)


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert surroundings.remembered_in() == str(tmp_path / "hf" / "hf_lowmem" / "kernels")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    assert surroundings.remembered_in().endswith("each process compares anew")


def test_every_kernel_has_a_size_at_which_it_is_timed() -> None:
    """At a small size in place of an 8B model's: the arguments fit the kernel, and what moves is all of them."""
    found = large(4, 128, 256)
    assert {name for name, _ in found} == set(KERNELS)
    for (name, what), make in found.items():
        kernel, args = KERNELS[name], make(CPU)
        results = kernel.reference(*args)
        assert not kernel.supports(*args), (name, what)
        tensors = [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
        assert bytes_moved(kernel, args, results) >= sum(t.nbytes for t in tensors)
    adamw = found["adamw_step", "8bit, bf16_sr"](CPU)
    n = 128 * 256  # a gradient, and weight, codes and scalars twice: 2 + 2 * (2 + 2 + bytes of scalars)
    assert 10 * n < bytes_moved(KERNELS["adamw_step"], adamw, None) < 10.5 * n


@pytest.mark.parametrize(
    ("capabilities", "said"),
    [
        ([(9, 0)], "fp8_row, fp8_tensor, int8_row"),
        ([(8, 9), (8, 0)], "int8_row"),
        ([(7, 0)], "no GPU here has such products"),
    ],
)
def test_products_in_8_bits_are_those_of_the_least_device(
    capabilities: list[tuple[int, int]], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
    assert surroundings.products() == said
