"""A run that is killed again and again ends in the bits of one that never was; see scripts/stress/kill_resume.py."""

import json
import os
import re
from pathlib import Path

import pytest

from tests.dist.imported import run_module

ROOT = Path(__file__).parents[2]


@pytest.mark.train
@pytest.mark.dist
@pytest.mark.parametrize(
    ("kills", "weights"),
    [(2, "bf16_sr"), *(pytest.param(20, weights, marks=pytest.mark.slow) for weights in ("bf16_sr", "int8_sr"))],
)
def test_a_killed_run_ends_in_the_same_bits(kills: int, weights: str) -> None:
    words = ["--kills", str(kills), "--seed", "7", "--weights", weights]
    if kills < 8:
        words += ["--method", "adamw"]
    done = run_module("scripts.stress.kill_resume", words, os.environ | {"OMP_NUM_THREADS": "1"}, seconds=7200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(
        rf"^{kills} kills, \d+ of them inside a save; \d+ runs, 0 that ended in other bits$", done.stdout, re.M
    )


@pytest.mark.parametrize("name", ["kill_resume.json", "kill_resume_int8.json"])
def test_the_record_of_two_hundred_kills_holds(name: str) -> None:
    found = json.loads((ROOT / "scripts" / "stress" / "records" / name).read_text())
    assert found["kills"] == 200
    assert found.get("weights", "bf16_sr") == ("int8_sr" if "int8" in name else "bf16_sr")
    assert found["inside a save"] >= 50
    assert found["runs"]
    assert all(run["equal"] and run["losses_equal"] for run in found["runs"])
