"""What a fork returns is what a process of its own would."""

import os

import pytest

from tests.dist.imported import ROOT, run_module

pytestmark = [pytest.mark.dist, pytest.mark.train]


def test_a_fork_is_a_process_with_its_own_words_environment_and_status() -> None:
    done = run_module("tests.dist.fork_worker", ["say", "it"], {**os.environ, "TOLD": "it"})
    assert (done.returncode, done.stdout.splitlines()) == (0, [f"say it it {ROOT}"])


def test_a_failure_has_its_traceback_and_status() -> None:
    done = run_module("tests.dist.fork_worker", ["fail"])
    assert done.returncode == 1
    assert "ValueError: as it was told" in done.stderr
    assert run_module("tests.dist.fork_worker", ["die"]).returncode == -9
    assert run_module("tests.dist.fork_worker", ["say"]).returncode == 0, "the next one is served"
