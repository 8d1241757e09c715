"""scripts/bench/sample.py at toy size: a row a share and way of drawing; codes are nearer than any sample."""

from pathlib import Path
from typing import Any

import pytest

import sample
from parts.record import read_rows
from tests.conftest import tiny_llama, word_tokenizer

pytestmark = pytest.mark.train


def test_every_way_of_drawing_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "sample.jsonl"
    monkeypatch.setattr(sample, "load", lambda source: (tiny_llama(num_hidden_layers=2), word_tokenizer()))
    monkeypatch.setattr(sample, "prepare_model", lambda model, cache: "unused")
    texts: Any = {"text": ["w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w12"] * 4}
    monkeypatch.setattr(sample.data, "load_plays", dict)
    monkeypatch.setattr(sample.data, "split_plays", lambda plays, **kwargs: (plays, plays))
    monkeypatch.setattr(sample.data, "sft_dataset", lambda *args, **kwargs: texts)
    assert sample.main(["--record", str(record)]) == 0
    rows = read_rows(record)
    errors = {(row["by"], row["share"]): row for row in rows if row["part"] == "error"}
    assert len(errors) == len(sample.SHARES) * len(sample.BY) + 1
    assert min(row["one_draw"] for (by, _), row in errors.items() if by != "codes") > errors["codes", 1.0]["one_draw"]
    one = errors["x", 0.3]
    assert one["mean_of_draws"] < one["one_draw"] / 2
    whole, part = (row["saved_bytes"] for row in rows if row["part"] == "kept")
    assert part < whole
