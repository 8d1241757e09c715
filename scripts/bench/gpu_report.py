"""What a record of gpu_once.sh says: its tables, a plot, and how well the planner had predicted it.

    python scripts/bench/gpu_report.py gpu_out/gpu.jsonl           # prints; draws gpu_out/gpu.png
    python scripts/bench/gpu_report.py gpu_out/gpu.jsonl --keep    # the record becomes scripts/bench/records/gpu.jsonl

A record of `TOY=1` is printed and never kept. The exit status is 1 where a row of the record is wrong.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from parts.gpu import calibrate, report
from parts.record import RECORDS, read_rows, write_rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("--keep", action="store_true", help="make it this clone's record, which READMEs may show")
    options = parser.parse_args(arguments)
    rows = read_rows(options.record)
    if not rows:
        parser.error(f"{options.record} has no rows. bash scripts/bench/gpu_once.sh writes them.")
    print(report.tables(rows))
    print(calibrate.peaks(rows))
    print(calibrate.constants(rows))
    report.draw(rows, options.record.with_suffix(".png"))
    if options.keep:
        if any(row["toy"] for row in rows):
            parser.error(f"{options.record} has rows of a toy run, whose figures mean nothing.")
        write_rows(RECORDS / "gpu.jsonl", rows)
    wrong = [row for row in rows if row.get("wrong")]
    for row in wrong:
        print(f"wrong: {row}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
