"""The commit that a record names: of a clone, marked where files differ from it."""

import subprocess
from pathlib import Path

import pytest

from hf_lowmem.runs.facts import commit_of


def git(root: Path, *args: str) -> str:
    who = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(root), *who, *args], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    root = tmp_path / "clone"
    (root / "bench" / "records").mkdir(parents=True)
    (root / "code.py").write_text("1\n")
    (root / "bench" / "records" / "a.jsonl").write_text("{}\n")
    git(tmp_path, "init", "-q", str(root))
    git(root, "add", ".")
    git(root, "commit", "-qm", "one")
    return root


def test_a_clone_is_named_by_its_commit(clone: Path) -> None:
    assert commit_of(clone) == git(clone, "rev-parse", "HEAD")


@pytest.mark.parametrize("name", ["code.py", "bench/new.py", "new.py"])
def test_a_change_is_said(clone: Path, name: str) -> None:
    (clone / name).write_text("2\n")
    expected = git(clone, "rev-parse", "HEAD") + " with changes"
    assert commit_of(clone) == commit_of(clone, but="bench/records") == expected


@pytest.mark.parametrize("name", ["a.jsonl", "new.jsonl"])
def test_what_a_run_writes_does_not_count(clone: Path, name: str) -> None:
    (clone / "bench" / "records" / name).write_text("{}\n{}\n")
    assert commit_of(clone, but="bench/records") == git(clone, "rev-parse", "HEAD")
    assert str(commit_of(clone)).endswith(" with changes")


def test_what_is_no_clone_has_no_commit(clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert commit_of(tmp_path) is None
    assert commit_of(clone / "bench") is None, "a folder inside somebody else's repository"
    assert commit_of(tmp_path / "nowhere") is None
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert commit_of(clone) is None


def test_a_link_to_a_clone_is_the_clone(clone: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(clone)
    assert commit_of(link) == commit_of(clone)
