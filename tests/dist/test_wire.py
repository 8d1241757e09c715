"""What each method sends beside FSDP2 itself: counted, and equal to the table below.

The record that README's figures come from is held to the same arithmetic at its own sizes, and the code is counted
anew at small ones.

What a step sends for each matrix (m, n) of rank r, beside the 3 m n values of FSDP2's own, in values of fp32; the sum
of x values on all processes counts as 2 x. Vectors send nothing (lamb: norms), nor do batches of matrices, and every
step sends one byte a parameter, to agree on bad gradients.

| method           | m >= n                | m < n                                              |
|------------------|-----------------------|----------------------------------------------------|
| adamw, lion      | -                     | -                                                  |
| adam_mini, scale | -                     | -                                                  |
| muon             | m n to gather         | m n to gather                                      |
| lamb             | 2 norms               | 2 norms                                            |
| apollo           | 1 norm                | r n to project, n for channels' factors, 1 norm    |
| apollo_mini      | 3 norms               | n to project (r = 1), 3 norms                      |
| galore           | -                     | r n to project, r n to project back                |
| fira             | 1 norm                | r n to project, 2 r n to project back, n, 1 norm   |
| natural_galore   | s x s products        | as galore, and s x s products                      |
| a new "subspace" | a sum of r n, 2 peaks | a sum of r n, r m, 2 peaks                         |

A basis is new once in `update_gap` steps; the first one takes four rounds.
"""

from pathlib import Path
from typing import Any

import pytest

import wire
from hf_lowmem.optim import OPTIMIZERS
from parts.record import RECORDS, read_rows

LAYERS, PARAMETERS = 2, {"layers": 6, "tall": 4}
HALF = 0.5  # of what is summed (twice) or gathered, a process of two sends a half
NORM, VALUE = 8, 4  # squares are summed in float64, projections in fp32
SUBSPACE = ("galore", "fira", "natural_galore")


def passes(row: dict[str, Any]) -> float:
    """Weights are gathered for forward and for backward, gradients scattered."""
    values = LAYERS * (row["m"] ** 2 + (PARAMETERS[row["case"]] // LAYERS - 1) * row["m"] * row["n"])
    return 3 * HALF * values * VALUE


def step(row: dict[str, Any]) -> float:
    """Bytes in an ordinary step; a sum counts twice."""
    name, rank, parameters = row["method"], row["rank"] or 0, PARAMETERS[row["case"]]
    if name == "torch AdamW":
        return 0
    norms = {"lamb": 2, "apollo": 1, "apollo_mini": 3, "fira": 1}.get(name, 0) * parameters * NORM
    products = 4 * 4 * NORM * parameters if name == "natural_galore" else 0  # s = 4
    gathers = {"apollo": 1, "apollo_mini": 0, "galore": rank, "natural_galore": rank, "fira": 2 * rank + 1}
    wide = LAYERS if row["case"] == "layers" else 0  # matrices with m < n
    down = (rank + gathers[name]) * row["n"] * VALUE * wide if name in gathers else 0
    whole = passes(row) / 3 if name == "muon" else 0
    return 2 * HALF * (parameters + norms + products) + HALF * down + whole


def basis(row: dict[str, Any], rounds: int) -> float:
    """Bytes beside those of an ordinary step where it makes new bases."""
    if row["method"] not in SUBSPACE:
        return 0
    parameters, wide = PARAMETERS[row["case"]], LAYERS if row["case"] == "layers" else 0
    tall = (parameters - wide) * 2 * row["m"]
    values = row["rank"] * (tall + wide * (2 * row["n"] + row["m"]))
    return HALF * VALUE * (rounds * values + 2 * 2 * parameters)


def check(rows: list[dict[str, Any]]) -> None:
    assert [(row["case"], row["method"]) for row in rows] == [(c, name) for c in wire.CASES for name in wire.METHODS]
    for row in rows:
        assert row["passes"] == passes(row), row
        assert row["step"] == step(row), row
        assert row["refresh"] == step(row) + basis(row, 1), row
        assert row["first"] == step(row) + basis(row, 4), row
        assert row["ratio"] == (passes(row) + step(row)) / passes(row)
    found = {(row["case"], row["method"]): row for row in rows}
    assert found["layers", "apollo"]["ratio"] <= 1.07
    assert found["layers", "adamw"]["ratio"] <= 1.0001
    # One number a matrix, beside the byte of each that says whether its gradient is finite; no more calls than that.
    tall = found["tall", "apollo"]
    assert tall["calls"] == {"all_reduce": PARAMETERS["tall"] + 1}
    assert tall["step"] == PARAMETERS["tall"] * (NORM + 1)


@pytest.mark.train
@pytest.mark.dist
def test_bytes_over_the_wire(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "wire.jsonl"
    assert wire.main(["--sizes", "256", "688", "16", "--record", str(record)]) == 0
    rows = read_rows(record)
    check(rows)
    assert all(row["commit"] and row["device"] and row["versions"] for row in rows)
    assert "| `apollo` |" in capsys.readouterr().out


def test_the_record_is_of_the_methods_that_there_are() -> None:
    rows = read_rows(RECORDS / "wire.jsonl")
    check(rows)
    assert set(wire.METHODS) == {"torch AdamW", *OPTIMIZERS} - {"soap"}, "soap is refused, by name"
    assert all(row["m"] == 16 * row["rank"] for row in rows if (row["rank"] or 0) > 1)
