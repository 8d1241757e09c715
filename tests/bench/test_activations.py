"""The benchmark of saved activations runs, every part of it, at toy size, so that it can never rot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_lowmem.specs import TIERS
from parts.record import of_part, read_rows

pytestmark = pytest.mark.train  # starts processes

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "activations.py"
PARTS = ("bytes", "error", "time", "peaks", "loss")


def test_every_part_runs_and_reports(tmp_path: Path) -> None:
    record = tmp_path / "activations.jsonl"
    flags = [flag for part in (*PARTS, "report") for flag in ("--part", part)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--smoke", "--record", str(record), *flags],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_rows(record)
    for part in PARTS:
        found = of_part(rows, part)
        assert {"HuggingFace", *TIERS} <= {row["way"] for row in found}
        assert all(row["commit"] and row["device"] and row["versions"] for row in found)
    units = {row["way"]: row["units"] for row in rows if row["part"] == "bytes" and row["case"] == "Llama-3-8B"}
    assert units["checkpoint_fp8"] < units["fp8_recompute"] < units["fp8"] < units["exact"] < units["HuggingFace"]
    errors = {row["way"]: row["worst"] for row in rows if row["part"] == "error"}
    assert errors["exact"] == errors["HuggingFace"] < 1e-4 < errors["fp8"]
    assert record.with_suffix(".png").exists()
    assert "Held-out loss" in done.stdout
