"""The benchmark of weights' stores runs at toy size, and its record is what its table is made of."""

import math
from pathlib import Path

import pytest

from parts.record import RECORDS, read_rows
from parts.small_llama import SMOKE
from parts.weights.runs import LOWEST, METHODS, STORES, Job, run
from weights import jobs, table


@pytest.mark.train
@pytest.mark.parametrize("kind", ["nothing", "continued"])
def test_a_run_of_each_store(kind: str) -> None:
    rows = [run(Job(kind, "adamw", store, 0.001, 0), SMOKE) for store in STORES]
    losses = {row["store"]: row["heldout_loss"] for row in rows}
    assert all(math.isfinite(loss) for loss in losses.values())
    assert len(set(losses.values())) > 4  # a store that changed nothing would be another's
    assert max(losses.values()) - min(losses.values()) < 0.1
    sizes = {row["store"]: row["weight_bytes_per_parameter"] for row in rows}
    assert (sizes["masters"], sizes["keep"], sizes["bf16_sr"], sizes["bf16_ecc"]) == (4, 2, 2, 2)
    assert 1 < sizes["int8_sr"] < 1.5
    assert "int8_sr" in table(rows)


def test_only_takes_words_of_each_kind() -> None:
    every = jobs([])
    assert len(every) == len(set(every)) == (2 * len(METHODS) + len(LOWEST)) * 3 * len(STORES)
    some = jobs(["continued", "int8_sr", "masters"])
    assert {(job.kind, job.store) for job in some} == {("continued", "int8_sr"), ("continued", "masters")}
    assert {job.method for job in some} == set(METHODS)


def test_the_record_is_of_these_jobs() -> None:
    rows = read_rows(Path(RECORDS) / "weights.jsonl")
    found = [tuple(row[name] for name in Job._fields) for row in rows]
    assert found
    assert len(set(found)) == len(found)
    assert set(found) <= set(jobs([]))
    assert table(rows)
