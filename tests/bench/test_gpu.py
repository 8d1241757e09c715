"""`gpu_once.sh` at toy size, so that the script for a CUDA device cannot rot where there is none; and its report."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpu_once
import gpu_report
from hf_lowmem.kernels import KERNELS
from parts.gpu import calibrate, kernels, report
from parts.gpu.steps import Case, run
from parts.gpu.training import WHOLE
from parts.record import ROOT, Row, read_rows, write_rows

STEPS = ("check", "proofs", "roof", "optimizer", "kernels", "layers", "whole", "products")
CPU = torch.device("cpu")


def environment(folder: Path, **more: str) -> dict[str, str]:
    # torch.compile keeps what it has compiled for all processes of a user: another run, or one that was killed as it
    # wrote, must not decide a test. One thread compiles in the process itself.
    own = {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)} | own | more


@pytest.mark.train
def test_every_step_runs_at_toy_size(tmp_path: Path) -> None:
    record = tmp_path / "gpu.jsonl"
    command = [sys.executable, "scripts/bench/gpu_once.py", *STEPS, "--cases", "1", "--toy", "--record", str(record)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(tmp_path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = read_rows(record)
    assert tuple(dict.fromkeys(row["step"] for row in rows)) == STEPS
    missing = "No module named 'bitsandbytes'"
    assert not [row for row in rows if row.get("wrong") or missing not in row.get("error", missing)]
    assert {row["kernel"] for row in rows if row["step"] == "check"} == set(KERNELS)
    text = report.tables(rows)
    assert text.count("\n| --- |") == len(report.TABLES)


@pytest.mark.slow
def test_the_whole_command_runs_at_toy_size(tmp_path: Path) -> None:
    """All steps, other packages' too, in their own processes."""
    env = environment(tmp_path, OUT=str(tmp_path / "out"), TOY="1", LIMIT="3600", PYTHON=sys.executable)
    done = subprocess.run(["bash", "scripts/bench/gpu_once.sh"], capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout + (tmp_path / "out" / "steps.txt").read_text()[-4000:]
    errors = [row["error"] for row in read_rows(tmp_path / "out" / "gpu.jsonl") if "error" in row]
    assert not [error for error in errors if "No module named" not in error]


PYTHON = """#!/usr/bin/env bash
case "$*" in
*import*) echo one two ;;
*"gpu_once.py layers"*) exit 1 ;;
*"gpu_once.py whole"*) sleep 60 ;;
*) echo "$*" ;;
esac
"""


@pytest.mark.parametrize(
    ("more", "lines", "status"),
    [
        ({"ONLY": "smoke roof"}, ["smoke: exit status 0", "roof: exit status 0"], 0),
        ({"ONLY": "layers kernels"}, ["kernels: exit status 0", "layers: exit status 1"], 1),
        ({"ONLY": "roof full", "LIMIT": "5"}, ["roof: left out, no time", "full: left out, no time"], 0),
    ],
)
def test_steps_have_an_order_and_a_budget(tmp_path: Path, more: dict[str, str], lines: list[str], status: int) -> None:
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    env = environment(tmp_path, OUT=str(tmp_path / "out"), PYTHON=str(python)) | more
    done = subprocess.run(["bash", "scripts/bench/gpu_once.sh"], capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == status
    said = [line.split("] ")[1] for line in (tmp_path / "out" / "log.txt").read_text().splitlines()]
    assert said == [*lines, "end"]
    asked = (tmp_path / "out" / "steps.txt").read_text() if (tmp_path / "out" / "steps.txt").exists() else ""
    assert all(f"--kernel {name} --cases 4" in asked for name in ("one", "two")) == ("smoke" in more["ONLY"])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["roof", "--kernel", "quantize"], "--kernel and --cases are of the step check"),
        (["roof", "--cases", "2"], "--kernel and --cases are of the step check"),
        (["check", "--cases", "0"], "--cases 0: at least one case"),
        (["check", "--kernel", "no_such"], "invalid choice: 'no_such'"),
        (["no_such"], "invalid choice: 'no_such'"),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], reason: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu_once.main([*words, "--toy", "--record", str(tmp_path / "gpu.jsonl")])
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "gpu.jsonl").exists()


def test_a_step_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    env = environment(tmp_path, OUT=str(tmp_path / "out"), ONLY="roof layer")
    done = subprocess.run(["bash", "scripts/bench/gpu_once.sh"], capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 2
    assert 'ONLY="roof layer": there is no step layer. Choose of: smoke proofs' in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_step_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    record, common = tmp_path / "gpu.jsonl", {"device": "d", "commit": "c", "versions": {}, "toy": True}
    made: list[str] = []

    def case(name: str, value: Row | Exception, theirs: bool = False) -> Case:
        def measure() -> Row:
            made.append(name)
            if isinstance(value, Exception):
                raise value
            return value

        return Case({"case": name}, measure, theirs)

    first = [
        case("good", {"seconds": 1.0}),
        case("bad", ValueError("no")),
        case("full", torch.OutOfMemoryError("full")),
        case("missing", ImportError("theirs"), theirs=True),
        case("wrong", {"wrong": True}),
    ]
    assert run("roof", first, record, common, CPU) == 2  # an error of ours, and a wrong result
    assert [row.get("error", "").partition(":")[0] for row in read_rows(record)] == [
        "",
        "ValueError",
        "OutOfMemoryError",
        "ImportError",
        "",
    ]
    assert read_rows(record)[1]["where"].startswith("test_gpu.py:")
    made.clear()
    run("roof", first, record, common, CPU)
    assert made == ["bad", "full", "missing"]  # what has figures is not measured again
    made.clear()
    run("roof", first[:1], record, common | {"commit": "another"}, CPU)
    run("kernels", first[:1], record, common, CPU)
    assert made == ["good", "good"]


def made_up(**more: object) -> Row:
    return {"device": "d", "commit": "c", "versions": {}, "toy": True, **more}


@pytest.mark.parametrize("most", [1, 2, 3, 4, 1000])
def test_no_more_cases_are_compared_than_asked_for(most: int) -> None:
    for case, kernel in zip(kernels.checks(CPU, list(KERNELS), most), KERNELS.values(), strict=True):
        some, every = (int(word) for word in case.what["case"].removesuffix(" cases").split(" of "))
        assert 1 <= some <= most
        assert every == len(list(kernel.cases()))
        assert some == every or some > most / 2


@pytest.mark.train
def test_the_report_sets_predicted_beside_measured_peaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    way = "adamw 8bit bf16_sr, fp8, step in backward"
    whole = {"step": "whole", "case": "2 layers, 1 x 32 tokens", "way": way, "tokens_per_second": 1.0, "seconds": 1.0}
    row = made_up(**whole, head="fused (trl)", peak=1, reserved=2)
    predicted = calibrate.planned(row).peak_bytes
    assert predicted > 500_000  # bytes: the toy's weights alone take more
    rows = [row | {"peak": predicted // 2}, row | {"head": "logits"}]
    rows += [made_up(step="roof", case="copy", bandwidth=4e12), made_up(step="roof", case="bf16 product", flops=6e14)]
    write_rows(tmp_path / "gpu.jsonl", rows)
    assert gpu_report.main([str(tmp_path / "gpu.jsonl")]) == 0
    text = capsys.readouterr().out
    assert "+100.0 %" in text
    assert "what is planned is TRL's" in text
    assert "| cost.RATIO | 150 | 150 |" in text
    assert (tmp_path / "gpu.png").exists()
    with pytest.raises(SystemExit):
        gpu_report.main([str(tmp_path / "gpu.jsonl"), "--keep"])
    assert "toy run" in capsys.readouterr().err
    write_rows(
        tmp_path / "gpu.jsonl", [made_up(step="check", kernel="k", case="1 of 1 cases", equal=False, wrong=True)]
    )
    assert gpu_report.main([str(tmp_path / "gpu.jsonl")]) == 1


@pytest.mark.train
def test_every_whole_step_can_be_planned() -> None:
    """By the fields that stand beside it: bytes of states a parameter, of a model whose embeddings are large."""
    found = {}
    for way in WHOLE:
        made = calibrate.planned(made_up(step="whole", case="2 layers, 1 x 32 tokens", way=way, head="fused (trl)"))
        found[way.partition(",")[0]] = 2 * made.parts["states"] / made.parts["weights"]
    assert found["torch AdamW fused"] == pytest.approx(4, rel=0.01)  # two moments in bf16
    assert 2 < found["adamw 8bit bf16_sr"] < found["bitsandbytes AdamW8bit"] < 3  # small weights' are fp32
    assert found["apollo_mini 8bit bf16_sr"] < 1


def test_without_a_device_the_real_sizes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        gpu_once.main(["roof", "--record", str(tmp_path / "gpu.jsonl")])
    assert "no CUDA device is visible" in capsys.readouterr().err
    assert not (tmp_path / "gpu.jsonl").exists()
