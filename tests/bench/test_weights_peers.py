"""Other packages' int8 beside ours, at toy size; what is written after Q-GaLore's store has that store's faults."""

import math

import pytest
import torch

from parts.record import RECORDS, read_rows
from parts.small_llama import SMOKE
from parts.weights.peers import STORES, WAYS, drift, qgalore_codes, run_way
from weights_peers import SEEDS, UPDATES, drift_table, run_table


@pytest.mark.train
def test_a_run_of_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    rows = [run_way(way, 0, SMOKE) for way in WAYS]
    losses = [row["heldout_loss"] for row in rows]
    assert all(map(math.isfinite, losses))
    assert len(set(losses)) == len(WAYS)
    assert max(losses) - min(losses) < 0.1
    size = {row["way"]: row["weight_bytes_per_parameter"] for row in rows}
    assert (size["masters"], size["bf16_sr"], size["torchao int8 products"], size["bitsandbytes paged"]) == (4, 2, 2, 2)
    assert all(1 < size[way] < 2 for way in STORES)
    assert len(run_table(rows)) == 2 + len(WAYS)


@pytest.mark.parametrize("way", STORES)
def test_drift_is_ours_alone_nothing(way: str) -> None:
    pytest.importorskip("torchao")
    found = drift(way, 20)
    assert 0 < found["normal"]["first"] < 0.02
    assert (found["normal"]["moved"] == 0) == (way == "int8_sr")
    assert (found["all positive"]["first"] > 0.9) == (way == "Q-GaLore's store")
    assert len(drift_table([found])) == 3


def test_the_store_is_the_papers_formula() -> None:
    """In float64, where its arithmetic is exact enough to be compared: w = (code - zero) * (max - min) / 255."""
    values = torch.randn(6, 256, generator=torch.Generator().manual_seed(0)).double()
    codes, scale, zero = qgalore_codes(values, None)
    low, high = values.min(1, keepdim=True).values, values.max(1, keepdim=True).values
    torch.testing.assert_close(scale, (high - low) / 255)
    assert torch.equal(zero, (-low / scale).round())
    # Half a code, and a whole one at the ends, where the rounded zero point puts a value outside of the codes.
    assert ((codes - zero) * scale - values).abs().max() <= scale.max()
    assert set(codes.unique().tolist()) <= set(range(256))


def test_the_record_is_whole() -> None:
    rows = read_rows(RECORDS / "weights_peers.jsonl")
    seeds = {r["seed"] for r in rows if r["part"] == "run"}
    assert {0} <= seeds <= set(SEEDS)
    assert {(r["way"], r["seed"]) for r in rows if r["part"] == "run"} == {(w, s) for w in WAYS for s in seeds}
    drifts = {r["way"]: r for r in rows if r["part"] == "drift"}
    assert set(drifts) == set(STORES)
    assert all(r["updates"] == UPDATES for r in drifts.values())
    assert drifts["int8_sr"]["normal"]["moved"] == drifts["int8_sr"]["all positive"]["moved"] == 0
