"""Every kernel compiled for every GPU it supports, without one: registers, shared memory, spills.

    python scripts/bench/kernel_targets.py                       # all; writes records/kernels_targets.{jsonl,txt}
    python scripts/bench/kernel_targets.py --only quantize --targets cuda:80 hip:gfx942 --out targets
    python scripts/bench/kernel_targets.py --hot                 # the table alone, a third of the time

Three sets are compiled: the table's, `compile_cases()` in each hf_lowmem/kernels/*/triton.py, at the shapes of an 8B
model; every specialisation that the equality cases launch; and every kernel with its integers at 1. Of the last two
nothing is recorded, but they must compile. What spills is printed, and of the table recorded:
tests/kernels/test_targets.py lists what may. Where anything fails, or holds an instruction that is not the reference's,
it is named, the record stays as it was, and the exit status is 1.

Three quarters of an hour on one core; what Triton's cache has is not compiled again. Run it with the oldest triton that
is supported as well: the two do not compile the same language.
"""

import os

os.environ.pop("TRITON_INTERPRET", None)  # read as the kernels are imported: it would replace what is to be compiled

import argparse
import sys
from pathlib import Path

from rich.console import Console

from parts.kernel_targets.ahead import TARGETS, Weight, table
from parts.kernel_targets.launched import Failure, weigh_hot, weigh_launched, weigh_ones
from parts.record import RECORDS, commit, versions_of, write_rows

RECORD = RECORDS / "kernels_targets"


def trouble(found: Weight | Failure) -> str:
    """What is wrong with a compiled kernel, or "". A spill costs time and no bits: see `spill`."""
    if isinstance(found, Failure):
        return str(found)
    odd = ", ".join(f"{count} {name}" for name, count in found.inexact.items())
    return f"{found.kernel}, {found.label} on {found.target}: {odd}" if odd else ""


def spill(found: Weight | Failure) -> str:
    """How much a kernel spills, or ""."""
    if isinstance(found, Failure) or not found.spills:
        return ""
    return f"{found.kernel}, {found.label} on {found.target}: spills {found.spills} bytes"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a kernel's folder or of a case's label")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--hot", action="store_true", help="without what the equality cases launch, and integers at 1")
    parser.add_argument("--out", type=Path, default=RECORD, help="where to write, without the suffixes .jsonl and .txt")
    args = parser.parse_args()

    console, weights, troubles, counts = Console(stderr=True), [], [], []
    for target in args.targets:
        for weigh in (weigh_hot,) if args.hot else (weigh_hot, weigh_launched, weigh_ones):
            with console.status(f"{target}: {weigh.__name__}"):
                found = list(weigh(target, args.only))
            counts.append(f"{target}, {weigh.__name__}: {len(found)}")
            troubles += filter(None, map(trouble, found))
            spills = list(filter(None, map(spill, found)))
            if weigh is weigh_hot:
                weights += [w for w in found if isinstance(w, Weight)]
            counts += spills
    print("compiled\n" + "\n".join(counts), file=sys.stderr)
    if troubles:
        print(f"{len(troubles)} of them are not as they must be:\n" + "\n".join(troubles), file=sys.stderr)
        return 1
    order = list(dict.fromkeys((w.kernel, w.label) for w in weights))
    weights.sort(key=lambda w: order.index((w.kernel, w.label)))  # stable: a case's targets stay in their order
    common = {"versions": versions_of(("torch", "triton")), "commit": commit()}
    write_rows(args.out.with_suffix(".jsonl"), [w.row() | common for w in weights])
    text = table(weights)
    args.out.with_suffix(".txt").write_text(text, encoding="utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
