"""scripts/bench/recipes.py at toy size: every way has a row, and equal compute is equal."""

from pathlib import Path

import pytest

import recipes
from parts.record import read_rows

pytestmark = pytest.mark.slow


def test_every_way_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "recipes.jsonl"
    monkeypatch.setattr(recipes, "SEEDS", (0,))
    assert recipes.main(["--record", str(record), "--smoke"]) == 0
    rows = read_rows(record)
    assert [(row["part"], row["way"]) for row in rows] == [(p, w) for p, ways in recipes.WAYS.items() for w in ways]
    for row in rows[1:3]:
        # Compute of the small model, in steps of the deep one, is what the deep one does not take.
        size = row["size"]
        deep, small = (
            recipes.cost(recipes.build_model(size | {"layers": n}, 0, bf16=False))
            for n in (size["layers"], size["layers"] // row["way"])
        )
        spent = row["steps"][0] * small + row["steps"][1] * deep
        assert abs(spent / (size["steps"] * deep) - 1) <= 0.5 / size["steps"]
    tables = [recipes.growth_table(rows), recipes.means_table(rows), recipes.adapters_table(rows)]
    assert [len(lines) for lines in tables] == [2 + 3, 2 + 2, 2 + 1 + 2 + 2 + 2]
    before = record.read_text()
    assert recipes.main(["--record", str(record), "--smoke"]) == 0
    assert record.read_text() == before
