"""scripts/bench/accumulation.py at toy size: both parts, a record that goes on, tables that say what it holds."""

from pathlib import Path

import pytest

import accumulation
from parts.record import of_part, read_rows

pytestmark = pytest.mark.train  # trains


def test_errors_and_losses_are_recorded_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "accumulation.jsonl"
    monkeypatch.setattr(accumulation, "SEEDS", (0, 1))
    monkeypatch.setattr(accumulation, "METHODS", {"adamw": 1e-3})
    arguments = ["--smoke", "--record", str(record)]
    assert accumulation.main(arguments) == 0
    rows = read_rows(record)
    assert [(r["seed"], r["passes"]) for r in of_part(rows, "errors")] == [(0, 2), (0, 4), (1, 2), (1, 4)]
    assert [r["sums"] for r in of_part(rows, "losses")] == [*accumulation.SUMS] * 2
    for row in of_part(rows, "errors"):
        assert 0 < row["bf16"] < row["int8_sr"] < 0.03 < row["noise"]
    assert accumulation.main(arguments) == 0
    assert read_rows(record) == rows
    shown = capsys.readouterr().out
    assert shown.endswith("\n".join(accumulation.loss_table(rows)) + "\n")
    assert "| `adamw` | +" in shown or "| `adamw` | -" in shown
