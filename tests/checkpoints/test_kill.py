"""A run that is killed again and again ends in the bits of one that never was; see scripts/stress/kill_resume.py."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.train
@pytest.mark.dist
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_run_ends_in_the_same_bits(kills: int) -> None:
    command = [sys.executable, "scripts/stress/kill_resume.py", "--kills", str(kills), "--seed", "7"]
    if kills < 8:
        command += ["--method", "adamw"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=7200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(
        rf"^{kills} kills, \d+ of them inside a save; \d+ runs, 0 that ended in other bits$", done.stdout, re.M
    )


def test_the_record_of_two_hundred_kills_holds() -> None:
    found = json.loads((ROOT / "scripts" / "stress" / "records" / "kill_resume.json").read_text())
    assert found["kills"] == 200
    assert found["inside a save"] >= 50
    assert found["runs"]
    assert all(run["equal"] and run["losses_equal"] for run in found["runs"])
