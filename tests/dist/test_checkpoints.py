"""Checkpoints of FSDP2, sharded and full: resumed bit for bit, on other numbers of processes, from and to one."""

from collections.abc import Callable
from pathlib import Path

import pytest

from hf_lowmem.optim import OPTIMIZERS
from tests.dist.launch import launch

SHARDABLE = ",".join([*(name for name in OPTIMIZERS if name != "soap"), "apollo_mini+scale", "galore+adam_mini"])
pytestmark = [pytest.mark.dist, pytest.mark.train]
Passed = Callable[[str], list[str]]


def test_a_resumed_run_is_uninterrupted(passed: Passed) -> None:
    assert len(passed("resume")) == 3 * 2 + 1


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["fp32", "int8", "fp8_expand", "int4"])
def test_every_method_resumes(codec: str, tmp_path: Path) -> None:
    launch(2, "resume", SHARDABLE, codec, str(tmp_path))


def reshard_load(processes: int, names: str, codecs: str, folder: Path) -> None:
    assert len(launch(processes, "reshard-load", names, codecs, str(folder))) > 1


def reshard(before: int, after: list[int], names: str, codecs: str, folder: Path) -> None:
    launch(before, "reshard-save", names, codecs, str(folder))
    for processes in after:
        reshard_load(processes, names, codecs, folder)


def test_two_processes_become_one(passed: Passed, folder: Path) -> None:
    assert passed("reshard-save") == ["all"]
    reshard_load(1, "adamw,apollo,natural_galore", "8bit", folder / "reshard")


@pytest.mark.slow
def test_other_numbers_of_processes_continue(tmp_path: Path) -> None:
    """Three have uneven shards, and two of them nothing of some parameters."""
    reshard(2, [1, 3], SHARDABLE, "fp32,8bit", tmp_path / "from2")
    reshard(1, [2, 3], SHARDABLE, "fp32,8bit", tmp_path / "from1")


def test_from_one_process_to_shards_and_back(passed: Passed) -> None:
    assert len(passed("convert")) == 3 * 2 + 1
    assert passed("foreign") == ["foreign", "all"]
