"""`scripts/bench/gpu.sh --toy` in parts, so that the script for a CUDA device cannot rot where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from parts.record import ROOT, read_rows

pytestmark = pytest.mark.train  # starts processes


@pytest.mark.parametrize("part", ["kernels", "optimizer", "training", "plan"])
def test_a_part_runs_at_toy_size(part: str, tmp_path: Path) -> None:
    record = tmp_path / "gpu.jsonl"
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # torch.compile keeps what it has compiled for all processes of a user: another run, or one that was killed as it
    # wrote, must not decide this test. One thread compiles in the process itself.
    env |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    # No minutes: at toy size nothing is left out for want of time.
    command = ["bash", "scripts/bench/gpu.sh", "--toy", "--minutes", "0"]
    command += ["--part", part, "--part", "report", "--record", str(record)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env | {"PATH": path}, timeout=3600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = read_rows(record)
    assert rows
    assert {row["part"] for row in rows} == {part}
    ours = [row for row in rows if "note" in row and "No module named" not in row["note"]]
    assert not ours, [row["note"] for row in ours]
    assert not any(row.get("wrong") for row in rows)
    assert "| --- |" in done.stdout


def test_without_a_device_the_real_sizes_are_refused(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/bench/gpu.py", "--part", "kernels", "--record", str(tmp_path / "gpu.jsonl")]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=3600)
    assert done.returncode == 2
    assert "no CUDA device is visible" in done.stderr
    assert not (tmp_path / "gpu.jsonl").exists()
