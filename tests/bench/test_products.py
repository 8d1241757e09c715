"""scripts/bench/products.py at toy size, and what its record says of errors."""

from pathlib import Path

import pytest

import products
from parts.products import cost
from parts.products.error import WAYS
from parts.record import of_part, read_rows

RECORD = read_rows(products.RECORD)


@pytest.mark.slow
def test_every_part_runs_and_loss_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchao")
    common = ["--smoke", "--record", str(tmp_path / "products.jsonl")]
    assert products.main([*common, "--part", "error", "--part", "cost", "--part", "loss", "--ways", "bf16"]) == 0
    first = of_part(read_rows(tmp_path / "products.jsonl"), "loss")
    assert products.main([*common, "--part", "loss", "--ways", "bf16", "fp8_row", "--part", "report"]) == 0
    rows = read_rows(tmp_path / "products.jsonl")
    losses = of_part(rows, "loss")
    assert losses[0] == first[0]
    assert [row["way"] for row in losses] == ["bf16", "fp8_row"]
    assert len(of_part(rows, "error")) == 4 * len(WAYS)
    assert all(row["heldout_loss"] > 0 and row["commit"] for row in losses)
    assert "| `fp8_row` |" in capsys.readouterr().out
    assert products.main([*common, "--part", "long", "--ways", "bf16", "fp8_row", "--part", "report"]) == 0
    long = of_part(read_rows(tmp_path / "products.jsonl"), "long")
    assert [len(row["heldout_loss"]) for row in long] == [2, 2]
    assert [len(row["train_loss"]) for row in long] == [4, 4]
    assert len(of_part(read_rows(tmp_path / "products.jsonl"), "error")) == 4 * len(WAYS)


def test_ours_are_no_worse_than_torchaos_recipes() -> None:
    """Of each product on each input, in the record."""
    found = {(r["case"], r["way"]): r for r in of_part(RECORD, "error")}
    cases = {case for case, _ in found}
    assert len(cases) == 4
    for ours, theirs in (("`fp8_row`", "torchao rowwise"), ("`fp8_tensor`", "torchao tensorwise")):
        for case in cases:
            for what in ("y", "dx", "dw"):
                # 1 %: scales are rounded up to bf16, theirs are not.
                assert found[case, ours][what] <= 1.01 * found[case, theirs][what], (case, what)


def test_the_model_of_the_cost_gains_with_the_tokens() -> None:
    rows = {row["tokens"]: row for row in cost.cost_rows()}
    assert rows[2048]["linears"] < rows[8192]["linears"] < rows[16384]["linears"] < cost.FP8 / cost.BF16
    assert 64 < cost.break_even() < 2048
