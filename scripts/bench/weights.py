"""What a store of weights costs: held-out loss beside fp32 masters, and bytes a weight.

    python scripts/bench/weights.py             # an hour or two on one core; writes records/weights.jsonl
    python scripts/bench/weights.py --report    # tables from the record
    python scripts/bench/weights.py --smoke     # a toy model, printed

The small Llama of 0.87 million parameters on Shakespeare, three seeds, with six methods in 8-bit states, trained
from nothing and continued; see parts/weights/runs.py. A difference is taken seed by seed; "control" is what a
difference of nothing comes to. Every finished run is a line of the record; the same command again makes what is
missing. `--only` takes words that a run's kind, method and store must be among.
"""

import argparse
import itertools
import math
import statistics
from pathlib import Path

import torch

from parts.record import RECORDS, Rows, append_row, provenance, read_rows
from parts.small_llama import SIZE, SMOKE
from parts.weights.runs import METHODS, SHARES, STEPS, STORES, Job, rates_of, run

RECORD = RECORDS / "weights.jsonl"
SEEDS = (0, 1, 2)


def jobs(only: list[str], seeds: tuple[int, ...] = SEEDS) -> list[Job]:
    every = (
        Job(kind, method, store, rate, seed)
        for method, kind in itertools.product(METHODS, SHARES)
        for rate in rates_of(kind, method)
        for seed in seeds
        for store in STORES
    )
    return [job for job in every if not only or {job.kind, job.method, job.store} <= {*only, *_free(only)}]


def _free(only: list[str]) -> set[str]:
    """The words of those kinds of words of which `only` has none."""
    return {word for words in (SHARES, METHODS, STORES) if not {*words} & {*only} for word in words}


def table(rows: Rows) -> str:
    """Loss of fp32 masters, and the difference of each store to it, mean over seeds ± its standard error."""
    lines = ["| run | rate | masters | " + " | ".join(STORES[1:]) + " |", "|---" * (2 + len(STORES)) + "|"]
    for kind, method in itertools.product(SHARES, METHODS):
        for rate in rates_of(kind, method):
            found = {
                (row["store"], row["seed"]): row["heldout_loss"]
                for row in rows
                if (row["kind"], row["method"], row["rate"]) == (kind, method, rate)
            }
            seeds = sorted({seed for store, seed in found if store == "masters"})
            if not seeds:
                continue
            cells = [f"{statistics.fmean(found['masters', seed] for seed in seeds):.4f}"]
            for store in STORES[1:]:
                gaps = [found[store, s] - found["masters", s] for s in seeds if (store, s) in found]
                error = f" ± {statistics.stdev(gaps) / math.sqrt(len(gaps)):.4f}" if len(gaps) > 1 else ", one seed"
                cells.append(f"{statistics.fmean(gaps):+.4f}{error}" if gaps else "")
            lines.append(f"| {kind}, {method} 8bit | {rate:g} | " + " | ".join(cells) + " |")
    sizes = {row["store"]: row["weight_bytes_per_parameter"] for row in rows}
    bytes_of = [f"{sizes[store]:.2f}" if store in sizes else "" for store in STORES[1:]]
    extra = ["", "", "1 more as state", ""]  # bf16_ecc's correction is of the optimizer's state
    said = [f"{size} {more}".strip() for size, more in zip(bytes_of, ["", *extra], strict=True)]
    first = f"{sizes['masters']:.2f}" if "masters" in sizes else ""
    lines.append(f"| bytes a weight, all of the model | | {first} | " + " | ".join(said) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], choices=[*SHARES, *METHODS, *STORES])
    parser.add_argument("--report", action="store_true", help="print the tables, train nothing")
    parser.add_argument("--smoke", action="store_true", help="a toy model for three steps; nothing is written")
    parser.add_argument("--record", type=Path, default=RECORD)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.smoke:
        print(table([run(job, SMOKE) for job in jobs(options.only, SEEDS[:2])]))
        return
    rows = read_rows(options.record)
    if not options.report:
        common = {"command": "python scripts/bench/weights.py", **provenance()}
        done = {tuple(row[name] for name in Job._fields) for row in rows}
        for job in jobs(options.only):
            if tuple(job) not in done:
                append_row(options.record, run(job, SIZE | {"steps": STEPS}) | common)
                print(job, flush=True)
        rows = read_rows(options.record)
    print(table(rows))


if __name__ == "__main__":
    main()
