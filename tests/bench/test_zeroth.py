"""scripts/bench/zeroth.py at toy size: a row a method, whose peak has no gradients where there is no backward pass; and
the plans of layers in host memory."""

from pathlib import Path
from typing import Any

import pytest

import zeroth
import zeroth_offload
from parts.record import read_rows
from tests.conftest import tiny_llama, word_tokenizer

pytestmark = pytest.mark.train  # trains


def test_every_method_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "zeroth.jsonl"
    monkeypatch.setattr(zeroth, "load", lambda source: (tiny_llama(num_hidden_layers=2), word_tokenizer()))
    monkeypatch.setattr(zeroth, "prepare_model", lambda model, cache: "unused")
    texts: Any = {"text": ["w1 w2 w3 w4", "w5 w6 w7 w8"]}
    monkeypatch.setattr(zeroth.data, "load_plays", dict)
    monkeypatch.setattr(zeroth.data, "split_plays", lambda plays, **kwargs: (plays, plays))
    monkeypatch.setattr(zeroth.data, "sft_dataset", lambda *args, **kwargs: texts)
    monkeypatch.setattr(zeroth, "RATES", dict.fromkeys(zeroth.RATES, 1e-5))
    assert zeroth.main(["--passes", "10", "--record", str(record)]) == 0
    rows = {row["method"]: row for row in read_rows(record)}
    assert list(rows) == list(zeroth.RATES)
    weights = sum(p.nbytes for p in tiny_llama(num_hidden_layers=2).parameters())
    for name, row in rows.items():
        assert row["weights_bytes"] == weights
        assert row["peak_bytes"] > weights + row["state_bytes"]
        assert row["forward_passes"] == row["steps"] * zeroth.PASSES.get(name.split()[0], 1)
    assert rows["adamw"]["peak_bytes"] - rows["adamw"]["state_bytes"] > 2 * weights
    assert rows["mezo"]["peak_bytes"] < 2 * weights


def test_plans_of_layers_in_host_memory_are_rows_of_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = zeroth_offload.rows(zeroth_offload.TOY, 16, None)
    assert 0 < row["peak_bytes"] < row["to_have_free"]
    assert row["host_bytes"] > 0
    assert capsys.readouterr().out.splitlines() == zeroth_offload.table([row])[2:]
