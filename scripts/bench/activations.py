"""Saved activations by tier: bytes, gradient error, time, peaks and loss, beside what HuggingFace users have.

    python scripts/bench/activations.py --part bytes --part error --part time     # minutes
    python scripts/bench/activations.py --part peaks       # Llama-3-8B weighed without a device
    python scripts/bench/activations.py --part loss        # a 5M model, 200 steps, three seeds; resumable
    python scripts/bench/activations.py --part report      # tables and the plot, from the record

Every row of records/activations.jsonl says which part and case it is, with device, versions and commit. A part that is
run again replaces its rows; `loss` adds the runs that are missing.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see hf_lowmem/cli/main.py; read when torch is imported

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console

from parts.activations import kept, peaks, trained
from parts.activations.report import draw, tables
from parts.record import RECORDS, Row, Rows, of_part, provenance, read_rows, write_rows

RECORD = RECORDS / "activations.jsonl"

PARTS: dict[str, Callable[[bool, Rows], Iterator[Row]]] = {
    "bytes": kept.bytes_rows,
    "error": trained.error_rows,
    "time": kept.time_rows,
    "peaks": peaks.peak_rows,
    "loss": trained.loss_rows,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*PARTS, "report"], action="append", required=True)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--record", type=Path, default=RECORD)
    options = parser.parse_args(arguments)
    console = Console()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    for part in [p for p in options.part if p != "report"]:
        common = {"command": f"python scripts/bench/activations.py --part {part}"} | provenance()
        rows = read_rows(options.record)
        old = of_part(rows, part)
        every = [row for row in rows if row["part"] != part or part == "loss"]
        for row in PARTS[part](options.smoke, old):
            every.append({"part": part} | row | common)
            write_rows(options.record, every)
            console.print(row, highlight=False, soft_wrap=True)
    if "report" in options.part:
        rows = read_rows(options.record)
        for table in tables(rows):
            console.print(table, highlight=False, markup=False, soft_wrap=True)
        draw(rows, options.record.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
