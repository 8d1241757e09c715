"""What every row of a record carries, and how records are read and written. Needs torch alone, no trl, no rich."""

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_lowmem.runs.facts import device_name, versions_of

__all__ = ["HERE", "RECORDS", "commit", "device_name", "read_rows", "versions_of", "write_rows"]

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


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
