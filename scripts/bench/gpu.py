"""What only a CUDA device can show: kernels, optimizer steps, training steps, and predicted against measured peaks.

    python scripts/bench/gpu.py --part kernels --part optimizer --part training --part plan
    python scripts/bench/gpu.py --part report
    python scripts/bench/gpu.py --part training --toy       # tiny sizes, any device: does it run at all?

Every row of records/gpu.jsonl has its part, device, versions and commit. A part that is run again replaces its rows on
that device; a row that fails says why (out of memory, a package that is not there) and the next goes on. A part stops
by itself before `--minutes` are over and says what it left out. With `--toy`, which only shows that it runs, it does
not.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see hf_lowmem/cli/main.py; read when torch is imported
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from parts.gpu import kernels, optimizer, plan, report, training
from parts.record import RECORDS, provenance, read_rows, write_rows

RECORD = RECORDS / "gpu.jsonl"
PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "bitsandbytes", "torchao", "flashoptim")

Part = Callable[[torch.device, bool, Callable[[], bool]], Iterator[dict[str, Any]]]
PARTS: dict[str, Part] = {
    "kernels": kernels.rows,
    "optimizer": optimizer.rows,
    "training": training.rows,
    "plan": plan.rows,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*PARTS, "report"], action="append", required=True)
    parser.add_argument(
        "--toy", action="store_true", help="tiny sizes, however long they take; the record is a temporary file"
    )
    parser.add_argument("--minutes", type=float, default=7.5, help="no row of a part starts later than that")
    parser.add_argument("--record", type=Path, default=None, help=f"default: {RECORD.relative_to(RECORDS.parent)}")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.toy:
        parser.error("no CUDA device is visible, and its figures are what this measures. --toy runs on a CPU.")
    path = options.record or (Path(tempfile.gettempdir()) / "hf_lowmem_gpu_toy.jsonl" if options.toy else RECORD)
    failed = 0
    for part in [p for p in options.part if p != "report"]:
        common = {
            "command": f"bash scripts/bench/gpu.sh --part {part}" + (" --toy" if options.toy else ""),
            **provenance(PACKAGES),
        }
        kept = [row for row in read_rows(path) if (row["part"], row["device"]) != (part, common["device"])]
        deadline = math.inf if options.toy else time.monotonic() + 60 * options.minutes
        for row in PARTS[part](device, options.toy, lambda end=deadline: time.monotonic() < end):
            kept.append({"part": part} | row | common)
            write_rows(path, kept)
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            failed += bool(row.get("wrong"))
    if "report" in options.part:
        print(report.tables(read_rows(path)))
        if not options.toy:
            report.draw(read_rows(path), path.with_suffix(".png"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
