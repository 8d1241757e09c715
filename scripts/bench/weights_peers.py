"""Int8 in training by other packages and by us, on the same model, data and seeds: bytes, losses, and drift.

    python scripts/bench/weights_peers.py             # ten minutes on one core; writes records/weights_peers.jsonl
    python scripts/bench/weights_peers.py --report    # tables from the record
    python scripts/bench/weights_peers.py --smoke     # a toy model, printed

The small Llama of 0.87 million parameters on Shakespeare, continued from what AdamW with fp32 masters has made of it,
at one rate for all; three seeds, the difference to masters taken seed by seed. parts/weights/peers.py says what each
way is. Packages run as they are installed, without torch.compile. A model so small says what a store does to a loss,
and nothing of speed. Every finished run is a line of the record; the same command makes what is missing.
"""

import argparse
import math
import os
import statistics
from pathlib import Path

import torch

from parts.record import RECORDS, Rows, append_row, provenance, read_rows
from parts.small_llama import SIZE, SMOKE
from parts.weights.peers import STORES, WAYS, drift, run_way
from parts.weights.runs import STEPS

RECORD = RECORDS / "weights_peers.jsonl"
SEEDS = (0, 1, 2)
PACKAGES = ("torch", "transformers", "torchao", "bitsandbytes")
UPDATES = 1000


def run_table(rows: Rows) -> list[str]:
    """Bytes, and loss against fp32 masters."""
    runs = {(row["way"], row["seed"]): row for row in rows if row["part"] == "run"}
    lines = [
        "| | bytes a weight, all of the model | bytes of states | loss, % against fp32 masters |",
        "|---|---|---|---|",
    ]
    for way in WAYS:
        seeds = [seed for name, seed in runs if name == way and ("masters", seed) in runs]
        if not seeds:
            continue
        some = runs[way, seeds[0]]
        gaps = [100 * (runs[way, s]["heldout_loss"] / runs["masters", s]["heldout_loss"] - 1) for s in seeds]
        error = f" ± {statistics.stdev(gaps) / math.sqrt(len(gaps)):.2f}" if len(gaps) > 1 else ", one seed"
        loss = "" if way == "masters" else f"{statistics.fmean(gaps):+.2f}{error}"
        sizes = [f"{some[f'{name}_bytes_per_parameter']:.2f}" for name in ("weight", "state")]
        lines.append(f"| {way} | {' | '.join(sizes)} | {loss} |")
    return lines


def drift_table(rows: Rows) -> list[str]:
    """What a thousand updates of zero do."""
    lines = ["| store | normal: encoded | moved | all positive: encoded | moved |", "|---|---|---|---|---|"]
    for row in (row for row in rows if row["part"] == "drift"):
        cells = [f"{100 * row[kind][what]:.2g} %" for kind in ("normal", "all positive") for what in ("first", "moved")]
        lines.append(f"| {row['way']} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="print the tables, train nothing")
    parser.add_argument("--smoke", action="store_true", help="a toy model for three steps; nothing is written")
    parser.add_argument("--record", type=Path, default=RECORD)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # torchao compiles its steps, a minute for each shape of a weight
    if options.smoke:
        rows = [run_way(way, seed, SMOKE) for seed in SEEDS[:2] for way in WAYS]
        rows += [drift(way, 3) for way in STORES]
    else:
        rows = read_rows(options.record)
    if not (options.report or options.smoke):
        size = SIZE | {"steps": STEPS}
        common = {"command": "python scripts/bench/weights_peers.py", **provenance(PACKAGES)}
        done = {(row["part"], row["way"], row.get("seed")) for row in rows}
        for way in STORES:
            if ("drift", way, None) not in done:
                append_row(options.record, drift(way, UPDATES) | common)
        for seed in SEEDS:
            for way in WAYS:
                if ("run", way, seed) not in done:
                    append_row(options.record, run_way(way, seed, size) | common)
                    print(way, seed, flush=True)
        rows = read_rows(options.record)
    print("\n".join([*run_table(rows), "", *drift_table(rows)]))


if __name__ == "__main__":
    main()
