"""scripts/bench/embeddings.py at toy size: every setting, a record that goes on, a table that says what it holds."""

from pathlib import Path

import pytest

import embeddings
from parts.record import read_rows

pytestmark = pytest.mark.train  # trains


def test_every_setting_is_tuned_and_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "embeddings.jsonl"
    monkeypatch.setattr(embeddings, "RATES", (1e-3, 1e-2))
    monkeypatch.setattr(embeddings, "SEEDS", (0, 1))
    assert embeddings.main(["--smoke", "--record", str(record), "--only", "scale"]) == 0
    first = read_rows(record)
    assert [(r["seed"], r["lr"]) for r in first[:2]] == [(100, 1e-3), (100, 1e-2)]
    assert embeddings.main(["--smoke", "--record", str(record)]) == 0
    rows = read_rows(record)
    assert rows[: len(first)] == first
    assert len(rows) == len(embeddings.SETTINGS) * (2 + 2)
    assert all(row["heldout_loss"] > 0 and row["commit"] for row in rows)
    best = {name: embeddings.best_rate(rows, name) for name in embeddings.SETTINGS}
    assert all(row["lr"] == best[row["setting"]] for row in rows if row["seed"] != embeddings.TUNING_SEED)
    by_setting = {row["setting"]: row["state_bytes_per_parameter"] for row in rows}
    assert (
        by_setting["scale"] < by_setting["apollo_mini, scale"] < by_setting["apollo_mini, adam"] < by_setting["adamw"]
    )
    shown = capsys.readouterr().out
    assert shown.endswith("\n".join(embeddings.table(rows)) + "\n")
    assert "| `apollo_mini`, `adam` |" in shown
