"""Records: rows of JSON, one a line, and where a row comes from. What reads or writes one goes through here.

Needs torch alone, no trl, no rich: a machine with a GPU may have neither.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hf_lowmem.runs.facts import commit_of, device_name, versions_of

__all__ = [
    "PACKAGES",
    "RECORDS",
    "ROOT",
    "Row",
    "Rows",
    "append_row",
    "commit",
    "device_name",
    "of_part",
    "provenance",
    "read_rows",
    "versions_of",
    "write_rows",
]

Row = dict[str, Any]
Rows = list[Row]

ROOT = Path(__file__).parents[3]
RECORDS = ROOT / "scripts" / "bench" / "records"
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets")  # where a script names no others


def commit() -> str | None:
    """Commit of this clone, marked where code differs from it. The records do not count: a run writes them."""
    return commit_of(ROOT, but="scripts/bench/records")


def provenance(packages: Sequence[str] = PACKAGES) -> Row:
    """Device, versions and commit: what every row says beside its figures."""
    return {"device": device_name(), "versions": versions_of(packages), "commit": commit()}


def read_rows(path: Path) -> Rows:
    """Rows of a record; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a record anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def append_row(path: Path, row: Row) -> None:
    """Add one row. Raises ValueError for a number that is not finite: JSON has none, and a row once added stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(row, allow_nan=False) + "\n"
    with path.open("a", encoding="utf-8") as file:
        file.write(line)


def of_part(rows: Rows, part: str) -> Rows:
    """Rows that one part of a script has made."""
    return [row for row in rows if row["part"] == part]
