"""Does a plan predict what a CUDA device takes? Twenty settings, each in a process of its own.

    python scripts/bench/plan_vs_cuda.py               # needs a card of 80 GB; writes records/plan_vs_cuda.jsonl
    python scripts/bench/plan_vs_cuda.py --minutes 8   # no setting starts later; the same command goes on
    python scripts/bench/plan_vs_cuda.py --toy         # tiny models on the CPU, three settings; nothing is written

`foretold` stands beside torch.cuda.max_memory_allocated, `foretold_reserved` (less its allowance for the context)
beside max_memory_reserved, from the first step's beginning. The aim: at most 3 % above what was taken, and never more
than 1 % below. Settings that are recorded already, on this device and commit, are not run again.

The exit status is 2 where there is no CUDA device, and 1 where a setting gave no figure or missed the aim.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from parts.gpu.plan import ABOVE, BELOW, SETTINGS, TOYS, in_own_process, row
from parts.record import RECORDS, provenance, read_rows, write_rows

RECORD = RECORDS / "plan_vs_cuda.jsonl"
PACKAGES = ("torch", "triton", "transformers", "trl", "accelerate", "peft", "bitsandbytes")


def within(found: dict[str, Any]) -> bool:
    return "difference" in found and -BELOW <= found["difference"] <= ABOVE


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="tiny models on the CPU, three settings; nothing is written")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no setting starts later than that")
    parser.add_argument("--record", type=Path, default=None, help=f"default: {RECORD.relative_to(RECORDS.parent)}")
    parser.add_argument(
        "--one", choices=SETTINGS, metavar="SETTING", help="one setting in this process; its row is printed as JSON"
    )
    options = parser.parse_args(arguments)
    if not options.toy and not torch.cuda.is_available():
        parser.error("no CUDA device is visible; its allocator is what plans are compared with. --toy runs on a CPU.")
    if options.one:
        setting = SETTINGS[options.one].toy() if options.toy else SETTINGS[options.one]
        print(json.dumps(row(setting, torch.device("cpu" if options.toy else "cuda"))))
        return 0
    common = {"command": "python scripts/bench/plan_vs_cuda.py" + (" --toy" if options.toy else "")}
    common |= provenance(PACKAGES) | ({"device": "CPU"} if options.toy else {})
    path = options.record or (None if options.toy else RECORD)
    same = ("device", "commit", "command")
    before = read_rows(path) if path else []
    kept = [r for r in before if r["device"] != common["device"] or all(r[key] == common[key] for key in same)]
    done = {r["setting"]: r for r in kept if all(r[key] == common[key] for key in same)}
    deadline = time.monotonic() + 60 * options.minutes
    for name in TOYS if options.toy else SETTINGS:
        if name in done:
            continue
        if time.monotonic() > deadline:
            print(f"{name:<60} left out: no time")
            return 1
        done[name] = {"setting": name} | in_own_process(name, options.toy) | common
        kept.append(done[name])
        if path:
            write_rows(path, kept)
        found = f"{100 * done[name]['difference']:+.2f} %" if "difference" in done[name] else done[name]["note"]
        print(f"{name:<60} {found}", flush=True)
    return 0 if all(within(found) for found in done.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
