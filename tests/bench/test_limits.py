"""Instructions a value: how they are counted, what times are made of them, and ceilings that kernels stay under."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from parts.limits.model import GPUS, Work, nanoseconds, over_floor, wavefronts
from parts.limits.sass import by_class, hot_path, parse

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "bench" / "limits.py"
RECORD = ROOT / "scripts" / "bench" / "records" / "limits.jsonl"

# Instructions a value on sm_90, of what nearly all of a training's time is spent in; and modelled time over the floor
# that memory sets on an H200. A step's includes the pass that checks the gradient, 1.2 of it.
CEILINGS = {
    "adamw int8_softsign,fp8_expand keep": (70, 1.21),
    "adamw int8_softsign,fp8_expand bf16_sr": (75, 1.21),
    "adamw fp32 keep": (58, 1.10),
    "lion int8_softsign keep": (50, 1.26),
    "quantize e4m3 bf16": (12, 1.0),
    "dequantize e4m3 bf16": (12, 1.0),
    "rmsnorm bf16": (28, 1.0),
    "rmsnorm_again bf16": (28, 1.0),
    "glu silu saved bf16": (37, 1.34),  # one of them shuts gates below -86
    "glu_save silu bf16": (55, 1.05),
    "glu_backward silu saved bf16": (43, 1.0),
}
TEXT = """
.section .text.kernel,"ax",@progbits
kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 BRA `(.L_x_1) ;
        /*0030*/                   MOV R9, 0x1 ;
        /*0040*/                   CALL.REL.NOINC `(slow) ;
.L_x_1:
        /*0050*/                   FFMA R1, R4, R5, R6 ;
.L_x_2:
        /*0060*/                   IADD3 R7, R7, 0x1, RZ ;
        /*0070*/                   MUFU.RCP R8, R7 ;
        /*0080*/                   ISETP.LT.AND P1, PT, R7, R9, PT ;
        /*0090*/               @P1 BRA `(.L_x_2) ;
        /*00a0*/                   STG.E R1, desc[UR4][R2.64] ;
        /*00b0*/                   EXIT ;
slow:
        /*00c0*/                   FMUL R1, R1, R1 ;
.section .nv.info
"""


def run(out: Path, *args: str) -> list[dict[str, Any]]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}  # which the script must set aside
    command = [sys.executable, str(SCRIPT), "--targets", "cuda:90", "--out", str(out), *args]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in out.read_text().splitlines()]


def check(row: dict[str, Any]) -> None:
    instructions, ratio = CEILINGS[row["case"]]
    assert row["instructions"] <= instructions, row
    assert row["over floor"]["H200"] <= ratio, row
    assert row["spills"] == 0, row


def test_the_path_leaves_out_slow_ones_and_counts_a_loop_once() -> None:
    code, labels = parse(TEXT)
    path, loops = hot_path(code, labels)
    names = [code[i].name for i in path]
    assert "CALL.REL.NOINC" not in names
    assert names == ["S2R", "LDG.E.128", "BRA", "FFMA", "IADD3", "MUFU.RCP", "ISETP.LT.AND", "BRA", "STG.E", "EXIT"]
    assert [(code[a].name, code[b].name) for a, b in loops] == [("IADD3", "BRA")]
    assert by_class(Counter(names)) == {
        "alu": 2, "fma": 1, "imad": 0, "mufu": 1, "cvt": 0, "control": 4, "memory": 2,
    }  # fmt: skip


def test_the_slowest_unit_decides() -> None:
    gpu, work = GPUS["H200"], Work(values=1, least=2, moved=4)
    few = Counter({"FFMA": 1})
    assert over_floor(few, work, gpu) == 2  # twice the least bytes, and nothing else takes as long
    many = Counter({"MUFU.RCP": 64})
    times = nanoseconds(many, work, gpu)
    assert max(times, key=lambda unit: times[unit]) == "special"
    assert times["special"] == 64 / 16 / (gpu.sms * gpu.ghz)
    assert over_floor(many, Work(1, 0, 0), gpu) == 0
    assert wavefronts(Counter({"LDG.E": 1, "STG.E.128": 1, "SHFL.BFLY": 1, "FFMA": 9})) == 3 + 4 + 1


@pytest.mark.train  # starts processes
def test_the_hot_kernels_are_under_their_ceilings(tmp_path: Path) -> None:
    for label in ("adamw int8_softsign,fp8_expand bf16_sr", "quantize e4m3 bf16"):
        rows = run(tmp_path / "rows.jsonl", "--only", label)
    found = [row for row in rows if row["case"] in CEILINGS]
    assert len(found) == 3
    for row in found:
        check(row)


def test_the_record_holds_them_with_both_versions_of_triton() -> None:
    rows = [json.loads(line) for line in RECORD.read_text().splitlines()]
    kept = {
        label: [r for r in rows if r["label"] == label and r["target"] == "cuda:90"] for label in ("before", "after")
    }
    for versions in kept.values():
        assert {row["versions"]["triton"] for row in versions} == {"3.6.0", "3.9.0"}
    hot = [row for row in kept["after"] if row["case"] in CEILINGS]
    assert len(hot) == 2 * len(CEILINGS)
    for row in hot:
        check(row)


@pytest.mark.train
@pytest.mark.slow
def test_every_kernel_is_no_worse_than_its_record(tmp_path: Path) -> None:
    """A tenth more is a change of the compiler's; more than that is one of ours."""
    rows = run(tmp_path / "rows.jsonl")
    version = rows[0]["versions"]["triton"]
    known = [json.loads(line) for line in RECORD.read_text().splitlines()]
    ours = [row for row in known if row["label"] == "after" and row["target"] == "cuda:90"]
    want = {row["case"]: row for row in ours if row["versions"]["triton"] == version}
    assert want.keys() == {row["case"] for row in rows} or not want, "the record is of other cases"
    for row in rows:
        known_row = want.get(row["case"], {"spills": 0, "instructions": float("inf")})
        assert row["spills"] <= known_row["spills"], row
        assert row["instructions"] <= 1.1 * known_row["instructions"], row
