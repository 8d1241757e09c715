"""A step on a CPU: ours by kernels that numba compiles, and by the reference, beside torch's fused fp32 AdamW.

    python scripts/bench/cpu.py                # two minutes on two cores; writes records/cpu.jsonl
    python scripts/bench/cpu.py --report       # the table of the record

Every round steps every optimizer once, on the same tensors: the parameters of one Llama layer and an embedding, 17
million of fp32. What counts is the median over the rounds of a step's time divided by that of torch's in the very same
round; how many nanoseconds a value took is beside it. First with one thread, then with all.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.optim import Optimizer

from hf_lowmem.kernels import current_impl, use_kernels
from hf_lowmem.kernels.proof import cpu_name
from hf_lowmem.kernels.registry import INSTALL, has_numba
from parts.optimizers.speed import PEERS, SIZE, Layer, ours, ratio, seconds, warmed, with_gradients
from parts.peers import REFERENCE
from parts.record import RECORDS, Row, Rows, commit, read_rows, versions_of, write_rows

RECORD = RECORDS / "cpu.jsonl"
METHODS = ("adamw", "apollo_mini", "lion")
STATE = "8bit"
IMPLS = {"kernels": "auto", "reference": "reference"}
CPU = torch.device("cpu")


def measure(size: dict[str, int], threads: int) -> Rows:
    """One row for torch's fused AdamW, and two for each of `METHODS`."""
    torch.set_num_threads(threads)
    model = with_gradients(Layer(size), CPU)
    count = sum(p.numel() for p in model.parameters())
    settings: dict[tuple[str, str], Optimizer] = {(REFERENCE, ""): warmed(PEERS[REFERENCE][1], model, size)}
    for method in METHODS:
        for name, impl in IMPLS.items():
            with use_kernels(impl):
                settings[f"{method} {STATE}", name] = warmed(ours(method, STATE), model, size)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in settings}
    for _ in range(size["rounds"]):
        for key, optimizer in settings.items():
            with use_kernels(IMPLS.get(key[1], current_impl())):
                times[key].append(seconds(optimizer.step, CPU))
    return [_row(key, found, times[REFERENCE, ""], count) | {"threads": threads} for key, found in times.items()]


def _row(key: tuple[str, str], found: list[float], torchs: list[float], count: int) -> Row:
    nanoseconds = statistics.median(found) / count * 1e9
    measured = {"nanoseconds_a_value": round(nanoseconds, 3), "step_ratio": round(ratio(found, torchs), 3)}
    return {"setting": key[0], "runs": key[1], "parameters": count} | measured


def report(rows: Rows) -> str:
    """A table with two columns for each number of threads."""
    threads = sorted({row["threads"] for row in rows})
    heads = [f"{head}, {n} thread{'s' * (n > 1)}" for n in threads for head in ("times torch's", "ns a value")]
    lines = ["| step | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    by = {(row["setting"], row["runs"], row["threads"]): row for row in rows}
    for setting, runs in dict.fromkeys((row["setting"], row["runs"]) for row in rows):
        lines.append(f"| {f'{setting}, {runs}' if runs else setting} | " + " | ".join(_cells(by, setting, runs)) + " |")
    return "\n".join(lines)


def _cells(by: dict[tuple[str, str, int], Row], setting: str, runs: str) -> Iterator[str]:
    for n in sorted({threads for _, _, threads in by}):
        row = by[setting, runs, n]
        yield f"{row['step_ratio']:.1f}"
        yield f"{row['nanoseconds_a_value']:.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--report", action="store_true", help="only print the table of the record")
    args = parser.parse_args()
    if not args.report:
        if not has_numba():
            parser.error(f"numba is not installed, so there are no kernels to measure: {INSTALL}")
        common = {
            "command": f"python scripts/bench/cpu.py --rounds {args.rounds}",
            "device": cpu_name(),
            "versions": versions_of(("torch", "numba", "llvmlite")),
            "commit": commit(),
        }
        every = torch.get_num_threads()
        found = [row for n in sorted({1, every}) for row in measure(SIZE | {"rounds": args.rounds}, n)]
        write_rows(args.record, [row | common for row in found])
    print(report(read_rows(args.record)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
