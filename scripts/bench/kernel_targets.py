"""Every kernel compiled for every GPU it supports, without one: registers, shared memory, spills.

    python scripts/bench/kernel_targets.py                       # all; writes records/kernels_targets.{jsonl,txt}
    python scripts/bench/kernel_targets.py --only quantize --targets cuda:80 hip:gfx942 --out targets

A quarter of an hour on one core; what Triton's cache has is not compiled again. Ends with an error if a kernel spills
registers on any target. What is compiled: `compile_cases()` in each hf_lowmem/kernels/*/triton.py, at the shapes of an
8B model.
"""

import os

os.environ.pop("TRITON_INTERPRET", None)  # read as the kernels are imported: it would replace what is to be compiled

import argparse
import sys
from pathlib import Path

from _record import RECORDS, commit, versions_of, write_rows
from rich.console import Console
from rich.progress import track

from hf_lowmem.kernels.ahead import TARGETS, compile_cases, table, weigh_all

RECORD = RECORDS / "kernels_targets"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a kernel's folder or of a case's label")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--out", type=Path, default=RECORD, help="where to write, without the suffixes .jsonl and .txt")
    args = parser.parse_args()

    cases = compile_cases(args.only)
    weighing, total = weigh_all(cases, args.targets), len(cases) * len(args.targets)
    weights = list(track(weighing, "compiling", total=total, console=Console(stderr=True)))
    common = {"versions": versions_of(("torch", "triton")), "commit": commit()}
    write_rows(args.out.with_suffix(".jsonl"), [w.row() | common for w in weights])
    text = table(weights)
    args.out.with_suffix(".txt").write_text(text, encoding="utf-8")
    print(text, end="")
    spilling = [f"{w.label} on {w.target}: {w.spills} bytes" for w in weights if w.spills]
    if spilling:
        print("spills: " + "; ".join(spilling), file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
