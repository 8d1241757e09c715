"""Products in 8 bits: errors beside torchao's recipes, loss of a small model, and a model of their cost.

    python scripts/bench/products.py --part error              # a minute
    python scripts/bench/products.py --part loss --steps 2000  # three seeds of four ways; resumable; hours on two cores
    python scripts/bench/products.py --part long               # 20,000 steps of each way at one rate; resumable
    python scripts/bench/products.py --part finetune           # SmolLM2-135M, 100 steps of each way; resumable
    python scripts/bench/products.py --part cost               # arithmetic, not a measurement
    python scripts/bench/products.py --part report             # tables, from the record

Every row of records/products.jsonl says which part and case it is, with device, versions and commit. `error` needs
torchao. A part that is run again replaces its rows; those that train add the runs that are missing.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see hf_lowmem/cli/main.py; read when torch is imported

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console

from parts.products import cost, error, report, trained
from parts.record import RECORDS, Row, Rows, of_part, provenance, read_rows, write_rows

RECORD = RECORDS / "products.jsonl"
TRAINED = ("loss", "long", "finetune")


def rows_of(part: str, options: argparse.Namespace, old: Rows) -> Iterator[Row]:
    if part == "error":
        return error.error_rows(options.smoke, old)
    if part == "cost":
        return cost.cost_rows()
    if part == "long":
        return trained.long_rows(options.smoke, old, options.ways)
    if part == "finetune":
        return trained.tuned_rows(options.smoke, old, options.model, options.ways)
    return trained.loss_rows(options.smoke, old, steps=options.steps, ways=options.ways, seeds=options.seeds)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["error", *TRAINED, "cost", "report"], action="append", required=True)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--steps", type=int, default=2000, help="of each run of the part loss")
    parser.add_argument("--ways", nargs="+", choices=trained.WAYS, default=trained.WAYS, help="of parts that train")
    parser.add_argument("--model", help="of the part finetune (default: SmolLM2-135M-Instruct from PyPI)")
    parser.add_argument("--seeds", nargs="+", type=int, default=trained.SEEDS, help="of the part loss")
    parser.add_argument("--record", type=Path, default=RECORD)
    options = parser.parse_args(arguments)
    console = Console()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    for part in [p for p in options.part if p != "report"]:
        more = f" --steps {options.steps}" if part == "loss" else ""
        packages = ("torch", "transformers", "torchao")
        common = {"command": f"python scripts/bench/products.py --part {part}{more}"} | provenance(packages)
        rows = read_rows(options.record)
        old = of_part(rows, part)
        every = [row for row in rows if row["part"] != part or part in TRAINED]
        for row in rows_of(part, options, old):
            every.append({"part": part} | row | common)
            write_rows(options.record, every)
            console.print(row, highlight=False, soft_wrap=True)
    if "report" in options.part:
        for table in report.tables(read_rows(options.record)):
            console.print(table, highlight=False, markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
