"""Instructions a value of every kernel, and its modelled time over what a GPU's memory allows, without a GPU.

    python scripts/bench/limits.py --label after                      # sm_80, 89, 90; adds to records/limits.jsonl
    python scripts/bench/limits.py --only "adamw int8" --targets cuda:90
    python scripts/bench/limits.py --show                             # the record's rows, the slowest first

Kernels are compiled ahead of time for each target, disassembled, and counted along the path that nearly every value
takes (parts/limits/sass.py); parts/limits/model.py makes times of the counts. A row is of one case, target, version of
triton and label; one that was there is replaced. The versions of triton compile differently: run it with each.
"""

import os

os.environ.pop("TRITON_INTERPRET", None)  # read as the kernels are imported: it would replace what is to be compiled

import argparse
import sys
from pathlib import Path

from parts.kernel_targets.ahead import CompileCase, compile_cases, compiled_for, weight_of
from parts.limits.cases import work_of
from parts.limits.model import GPUS, Work, over_floor
from parts.limits.sass import by_class, executed
from parts.record import RECORDS, Row, Rows, commit, read_rows, versions_of, write_rows

RECORD = RECORDS / "limits.jsonl"
TARGETS = sorted({gpu.target for gpu in GPUS.values()})


def measure(case: CompileCase, work: Work, target: str) -> Row:
    """One row but for where it comes from."""
    compiled = compiled_for(case, target)
    weight = weight_of(compiled, case.kernel, case.label, target, case.warps)
    operations = executed(compiled.asm["cubin"], loop=work.loop)
    kinds = {kind: round(count / work.values, 2) for kind, count in by_class(operations).items()}
    return {
        "part": "limits",
        "kernel": case.kernel,
        "case": case.label,
        "target": target,
        "instructions": round(sum(operations.values()) / work.values, 1),
        **kinds,
        "registers": weight.registers,
        "spills": weight.spills,
        "bytes": round(work.least, 3),
        "moved": round(work.moved, 3),
        "over floor": {
            name: round(over_floor(operations, work, gpu), 2) for name, gpu in GPUS.items() if gpu.target == target
        },
    }


def key(row: Row) -> tuple[str, ...]:
    return row["label"], row["kernel"], row["case"], row["target"], row["versions"]["triton"]


def show(rows: Rows) -> str:
    """The rows as a table, the slowest first."""
    head = (
        "x floor",
        "case",
        "target",
        "triton",
        "label",
        "I",
        "alu",
        "fma",
        "imad",
        "mufu",
        "cvt",
        "ctl",
        "mem",
        "reg",
    )
    lines: list[tuple[str, ...]] = [head]
    worst = sorted(rows, key=lambda row: -max(row["over floor"].values()))
    for row in worst:
        times = " ".join(f"{gpu} {x:.2f}" for gpu, x in row["over floor"].items())
        kinds = (row[kind] for kind in ("alu", "fma", "imad", "mufu", "cvt", "control", "memory"))
        facts = (times, row["case"], row["target"], row["versions"]["triton"], row["label"], row["instructions"])
        lines.append(tuple(str(cell) for cell in (*facts, *kinds, row["registers"])))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "".join("  ".join(map(str.ljust, line, widths)).rstrip() + "\n" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a kernel's folder or of a case's label")
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--label", default="now", help="what the rows are called in the record")
    parser.add_argument("--out", type=Path, default=RECORD)
    parser.add_argument("--show", action="store_true", help="print what the record has and measure nothing")
    args = parser.parse_args()
    if args.show:
        print(show(read_rows(args.out)), end="")
        return 0
    common = {"label": args.label, "versions": versions_of(("torch", "triton")), "commit": commit()}
    new = []
    for case in compile_cases(args.only):
        if (work := work_of(case)) is not None:
            new += [measure(case, work, target) | common for target in args.targets]
            print(f"{case.kernel}, {case.label}", file=sys.stderr)
    keys = set(map(key, new))
    write_rows(args.out, [row for row in read_rows(args.out) if key(row) not in keys] + new)
    print(show(new), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
