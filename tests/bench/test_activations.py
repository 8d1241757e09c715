"""The benchmark of saved activations runs, every part of it, at toy size, so that it can never rot."""

from pathlib import Path

import pytest

import activations
from hf_lowmem.specs import TIERS
from parts.record import of_part, read_rows

pytestmark = pytest.mark.train

PARTS = ("bytes", "error", "time", "peaks", "loss")


@pytest.mark.slow
def test_every_part_runs_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "activations.jsonl"
    flags = [flag for part in (*PARTS, "report") for flag in ("--part", part)]
    assert activations.main(["--smoke", "--record", str(record), *flags]) == 0
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
    assert "Held-out loss" in capsys.readouterr().out
