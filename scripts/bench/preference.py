"""Preference losses: what a step weighs and takes beside TRL's, and what each does to the answers.

    python scripts/bench/preference.py --part memory      # weighed without a device, minutes
    python scripts/bench/preference.py --part time --part sharing      # a CPU, minutes
    python scripts/bench/preference.py --part collapse    # addition, about 30 minutes of one core; resumable
    python scripts/bench/preference.py --part cosmosqa    # SmolLM2-135M, under an hour of one core; resumable
    python scripts/bench/preference.py --part report      # tables and plots, from the record

Every row of records/preference.jsonl says which part it is, with device, versions and commit. A part that is run again
replaces its rows; `collapse` and `cosmosqa` add the runs that are missing, so they may be stopped at any time.
`cosmosqa` downloads the bigbench package (358 MB) once, and keeps one file of it in the cache folder.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see hf_lowmem/cli/main.py; read when torch is imported

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console

from parts.record import RECORDS, Row, Rows, of_part, provenance, read_rows, write_rows

RECORD = RECORDS / "preference.jsonl"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hf_lowmem" / "bench"
PARTS = ("memory", "time", "sharing", "collapse", "cosmosqa")
RESUMED = ("collapse", "cosmosqa")


def rows_of(part: str, smoke: bool, old: Rows, cache: Path) -> Iterator[Row]:
    """What `part` yields; each is imported when it is asked for, as some take seconds to import."""
    if part == "memory":
        from parts.preference.memory import rows

        return rows(smoke)
    if part in ("time", "sharing"):
        from parts.preference.timing import sharing_rows, time_rows

        return time_rows(smoke) if part == "time" else sharing_rows(smoke)
    if part == "collapse":
        from parts.preference.collapse import rows as collapse_rows

        return collapse_rows(smoke, old, cache)
    from parts.preference.cosmosqa import rows as cosmosqa_rows

    return cosmosqa_rows(smoke, old, cache)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*PARTS, "report"], action="append", required=True)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--cache", type=Path, default=CACHE, help="models and downloads")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, no download: does it run at all?")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console = Console()
    for part in [part for part in options.part if part != "report"]:
        common = {"command": f"python scripts/bench/preference.py --part {part}"} | provenance()
        rows = read_rows(options.record)
        old = of_part(rows, part)
        kept = [row for row in rows if row["part"] != part or part in RESUMED]
        for row in rows_of(part, options.smoke, old, options.cache):
            kept.append({"part": part} | row | common)
            write_rows(options.record, kept)
            console.print(row, highlight=False, soft_wrap=True)
    if "report" in options.part:
        from parts.preference.report import draw, tables

        rows = read_rows(options.record)
        for table in tables(rows):
            console.print(table, highlight=False, markup=False, soft_wrap=True)
        draw(rows, options.record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
