"""Kernels compile for every GPU without one, and spill nothing: a few here, all of them with `-m slow`."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from parts.kernel_targets.ahead import TARGETS, CompileCase, Weight, compile_cases, inexact, table, weigh

pytestmark = pytest.mark.train  # starts processes

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "bench" / "kernel_targets.py"
RECORD = ROOT / "scripts" / "bench" / "records" / "kernels_targets.jsonl"
CASES = compile_cases()
MODULES = sorted((ROOT / "hf_lowmem" / "kernels").glob("*/triton.py"))


def run(out: Path, *args: str) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    """The script in a process of its own, where Triton compiles; here it may be the interpreter."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}  # which the script must set aside
    command = [sys.executable, str(SCRIPT), "--out", str(out), *args]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    rows = out.with_suffix(".jsonl").read_text().splitlines() if out.with_suffix(".jsonl").exists() else []
    return done, [json.loads(row) for row in rows]


STEP = "int8_softsign,fp8_expand"
# Bytes that a thread spills, by the version of triton; the record is of 3.9. They cost time and no bits.
SPILLS: dict[str, dict[tuple[str, str, str], int]] = {
    "3.9": {("adamw", f"adamw {STEP} keep", "cuda:80"): 8, ("lion", "lion fp8_expand keep", "cuda:120"): 8},
    "3.6": {("adamw", f"family {STEP} bf16_sr", "cuda:75"): 8, ("lion", "lion int8 bf16_sr", "cuda:100"): 8},
}
HERE = SPILLS.get(".".join(triton.__version__.split(".")[:2]), {})


def key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["kernel"], row["label"], row["target"]


def check(rows: list[dict[str, Any]], spills: dict[tuple[str, str, str], int] = HERE) -> None:
    """Compiled, within the 255 registers of a thread (AMD: 512), no fused or flushed float, spills as listed."""
    for row in rows:
        assert 0 < row["registers"] <= (255 if row["target"].startswith("cuda") else 512), row
        assert row["spills"] <= spills.get(key(row), 0), row
        assert row["inexact"] == {}, row


def test_a_few_compile_for_the_oldest_card_and_for_amd(tmp_path: Path) -> None:
    only = ["--only", "quantize e4m3", "--hot", "--targets", "cuda:75", "hip:gfx942"]
    done, rows = run(tmp_path / "few", *only)
    assert done.returncode == 0, done.stderr
    assert len(rows) == 2 * sum("quantize e4m3" in case.label for case in CASES) > 4
    check(rows)
    shown = (tmp_path / "few.txt").read_text()
    assert shown == done.stdout
    for row in rows:
        assert f"{row['registers']}/{row['shared']}" in shown


def test_the_record_has_every_kernel_on_every_target() -> None:
    """Made again whenever a kernel is added: python scripts/bench/kernel_targets.py."""
    rows = [json.loads(row) for row in RECORD.read_text().splitlines()]
    assert {key(row) for row in rows} == {(c.kernel, c.label, target) for c in CASES for target in TARGETS}
    check(rows, SPILLS["3.9"])
    assert {key(row): row["spills"] for row in rows if row["spills"]} == SPILLS["3.9"]
    weights = [Weight(**{name: row[name] for name in Weight.__dataclass_fields__}) for row in rows]
    assert RECORD.with_suffix(".txt").read_text() == table(weights)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.parent.name)
def test_whatever_is_launched_is_compiled_ahead(path: Path) -> None:
    nodes = [node for file in path.parent.glob("*.py") for node in ast.walk(ast.parse(file.read_text()))]
    grids = [node.func.value for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)]
    launched = {ast.unparse(kernel).rpartition(".")[2] for kernel in grids}  # name[grid](...)
    module = f"hf_lowmem.kernels.{path.parent.name}.triton"
    assert launched == {c.function.fn.__name__ for c in CASES if c.function.fn.__module__ == module}


# What a training with the recommended settings launches, and rows of one value, which were once a constant too many.
HOT = """
from parts.kernel_targets.launched import Failure, weigh_hot, weigh_launched
labels = (
    "check", "adamw int8_softsign,fp8_expand bf16_sr", "lion int8_softsign keep", "scale of rows",
    "step by rows bf16_sr", "encode int8_softsign signed", "decode fp8_expand unsigned", "glu_save silu bf16",
    "glu_backward silu saved bf16", "quantize e4m3 bf16", "rmsnorm bf16", "rmsnorm_backward bf16",
)
for label in labels:
    found = list(weigh_hot("cuda:90", label))
    print(*(w for w in found if isinstance(w, Failure) or w.spills or w.inexact), sep="\\n", end="")
for label in ("rmsnorm (1, 1)", "rmsnorm_backward (1, 1)"):
    print(*(w for w in weigh_launched("cuda:90", label) if isinstance(w, Failure)), sep="\\n", end="")
"""


def test_the_hot_ones_compile_with_the_triton_that_is_installed() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, SCRIPT.parent)))
    done = subprocess.run([sys.executable, "-c", HOT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_all_that_is_launched_compiles(target: str, tmp_path: Path) -> None:
    """The table's cases, each specialisation that the equality cases launch, and integers at 1."""
    done, rows = run(tmp_path / "all", "--targets", target)
    assert done.returncode == 0, done.stderr
    assert len(rows) == len(CASES)
    check(rows)


def test_what_cannot_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="only='no such kernel'"):
        compile_cases("no such kernel")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="without TRITON_INTERPRET=1"):
            weigh(CASES[0], "cuda:90")
    monkeypatch.setattr("triton.runtime.JITFunction", object)
    case = CASES[0]
    wrong = CompileCase(case.kernel, case.label, case.function, case.signature | {"extra": "i32"}, case.constants, 4)
    with pytest.raises(ValueError, match=r"extra must be once in the signature"):
        weigh(wrong, "cuda:90")


def test_a_spill_is_shown_and_what_rounds_twice_is_found() -> None:
    row = Weight("k", "case", "cuda:90", 4, 255, 16, 32, {})
    assert "255/32 !16" in table([row])
    ptx = "\tfma.rn.f32 \t%r1;\n\tfma.rn.f32x2 \t%r2;\n\tadd.f32 %r3;\n\tmad.lo.s32 \t%r5;\n\tdiv.rn.f32 \t%r6;\n"
    asked = "%1 = tail call float @llvm.fma.f32(float %2)\n%3 = call <2 x float> @llvm.fma.v2f32(<2 x float> %4)\n"
    assert inexact(ptx, asked) == {}
    assert inexact(ptx + "@%p1 ex2.approx.ftz.f32 \t%r4;\n", "") == {"ex2.approx.ftz.f32": 1, "fused": 3}
