"""What every row of a record carries, and how records are read and written. Needs torch alone, no trl, no rich."""

import json
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import hf_lowmem

HERE = Path(__file__).parent
RECORDS = HERE / "records"


def commit() -> str | None:
    """The commit of this clone, marked where code differs from it. The records do not count: a run writes them."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(HERE), *args], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changes = git("status", "--porcelain", "--", ":/", f":(exclude,top){RECORDS.relative_to(HERE.parent.parent)}")
        return git("rev-parse", "HEAD") + (" with changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """The installed ones of `packages`, and Python. A clone on the path that is not installed counts."""
    found = {"python": platform.python_version(), "hf-lowmem": hf_lowmem.__version__}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
