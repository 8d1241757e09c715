"""Memory that is free: what the machine says, and no more than a container's limit leaves."""

from pathlib import Path

import pytest
import torch

from hf_lowmem.memory import free

GIB = 2**30


def group(folder: Path, limit: str, used: int, files: int, *, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (limit, str(used)), strict=True):
        (folder / name).write_text(f"{value}\n")
    key = "inactive_file" if version == 2 else "total_inactive_file"
    (folder / "memory.stat").write_text(f"anon 1\n{key} {files}\n")


def test_each_group_up_to_the_root_leaves_something(tmp_path: Path) -> None:
    groups, own = tmp_path / "groups", tmp_path / "own"
    group(groups / "job", str(8 * GIB), 3 * GIB, GIB)
    group(groups / "job" / "step", "max", GIB, 0)
    own.write_text("0::/job/step\n")
    assert free.left_by_cgroups(groups, own) == [6 * GIB], "files that can be dropped are free"
    group(groups / "job" / "step", str(2 * GIB), GIB, 0)
    assert sorted(free.left_by_cgroups(groups, own)) == [GIB, 6 * GIB]


def test_a_container_that_sees_its_own_root_alone(tmp_path: Path) -> None:
    groups, own = tmp_path / "groups", tmp_path / "own"
    group(groups, str(4 * GIB), 5 * GIB, 0)
    own.write_text("0::/docker/0123\n")
    assert free.left_by_cgroups(groups, own) == [0], "less than nothing is nothing"


def test_version_1_is_read_too(tmp_path: Path) -> None:
    groups, own = tmp_path / "groups", tmp_path / "own"
    group(groups / "memory" / "job", str(4 * GIB), GIB, 0, version=1)
    own.write_text("5:cpu,cpuacct:/job\n4:memory:/job\n")
    assert free.left_by_cgroups(groups, own) == [3 * GIB]


def test_without_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert free.left_by_cgroups(tmp_path, tmp_path / "none") == []


def test_the_least_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = free.free_bytes(torch.device("cpu"))
    assert everything > 0
    monkeypatch.setattr(free, "left_by_cgroups", lambda: [12345])
    assert free.free_bytes(torch.device("cpu")) == 12345
