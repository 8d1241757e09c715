"""scripts/bench/arithmetic.py at toy size, and its record."""

from pathlib import Path

import pytest
import torch

import arithmetic
from parts.preference.sums import PAD, Sum, completion_logps
from parts.record import read_rows


@pytest.mark.train
def test_every_setting_is_tuned_and_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "arithmetic.jsonl"
    monkeypatch.setattr(arithmetic, "RATES", (1e-3, 1e-2))
    monkeypatch.setattr(arithmetic, "SEEDS", (0, 1))
    flags = ["--smoke", "--record", str(record)]
    assert arithmetic.main([*flags, "--only", "scale"]) == 0
    first = read_rows(record)
    assert arithmetic.main(flags) == 0
    rows = read_rows(record)
    assert rows[: len(first)] == first
    assert len(rows) == len(arithmetic.SETTINGS) * (2 + 2)
    assert all(row["lr"] == arithmetic.best_rate(rows, row["setting"]) for row in rows if row["seed"] < 100)
    assert len(arithmetic.table(rows)) == 3 + len(arithmetic.SETTINGS)


def test_the_loss_is_that_of_answers_and_their_end() -> None:
    model = arithmetic.build_model(32, 1, 0).eval()
    sums = [Sum(17, 25), Sum(99, 98)]
    ids, labels = next(arithmetic.batches(sums, 1, 64, 0))
    assert ids.shape == labels.shape == (64, 10)
    assert {row.count(-100) for row in labels.tolist()} == {6, 7}
    assert {row.count(PAD) for row in ids.tolist()} == {0, 1}
    long = (labels != -100).sum(1) == 4
    values, tokens = completion_logps(model, [s.prompt for s in sums], [s.answer for s in sums])
    for of_long, i in ((False, 0), (True, 1)):
        some = long == of_long
        loss = arithmetic.loss_of(model, ids[some], labels[some])
        torch.testing.assert_close(loss, -values[i] / tokens[i])


def test_the_record_is_whole() -> None:
    rows = read_rows(arithmetic.RECORD)
    scored = {(row["setting"], row["seed"]) for row in rows if row["seed"] != arithmetic.TUNING_SEED}
    assert scored == {(name, seed) for name in arithmetic.SETTINGS for seed in arithmetic.SEEDS}
    assert {row["size"] == arithmetic.SIZE for row in rows} == {True}
    assert all(row["lr"] == arithmetic.best_rate(rows, row["setting"]) for row in rows if row["seed"] < 100)
