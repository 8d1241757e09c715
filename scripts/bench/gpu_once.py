"""One step of gpu_once.sh: what only a CUDA device can show.

    python scripts/bench/gpu_once.py check --cases 4      # a few cases of every kernel against the reference
    python scripts/bench/gpu_once.py check proofs roof optimizer kernels layers whole products peers --toy

Every row has its step, device, versions and commit, and is on disk before the next one begins. A row that fails says
why (out of memory, a package that is not there), and the next goes on. Rows that the record has are not made again.
The exit status is 1 where one of ours failed or was wrong, and 2 where there is no device and no `--toy`.
"""

import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see hf_lowmem/cli/main.py; read when torch is imported
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
if "--toy" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from hf_lowmem.kernels import KERNELS
from parts.gpu import kernels, optimizer, products, proofs, training
from parts.gpu.steps import Case, run
from parts.record import RECORDS, provenance

RECORD = RECORDS / "gpu.jsonl"
PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "bitsandbytes", "torchao", "flashoptim")


def peers(device: torch.device, toy: bool) -> Iterator[Case]:
    """Other packages, at the same tasks; last, as each may be missing or fail."""
    yield from training.cases(device, toy, theirs=True)
    yield from optimizer.cases(device, toy, theirs=True)
    yield from products.cases(device, toy, theirs=True)


Step = Callable[[torch.device, bool], Iterator[Case]]
STEPS: dict[str, Step] = {
    "proofs": proofs.cases,
    "roof": kernels.roof,
    "optimizer": lambda device, toy: optimizer.cases(device, toy, theirs=False),
    "kernels": kernels.speeds,
    "layers": training.cases,
    "whole": training.whole_cases,
    "products": products.cases,
    "peers": peers,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["check", *STEPS], nargs="+")
    parser.add_argument(
        "--kernel", action="append", choices=list(KERNELS), help="check: this kernel alone; may be repeated"
    )
    parser.add_argument("--cases", type=int, help="check: at most so many cases of a kernel (default: 4)")
    parser.add_argument("--toy", action="store_true", help="tiny sizes; kernels run in Triton's interpreter")
    parser.add_argument("--record", type=Path, default=RECORD, help="rows are added to it (default: records/gpu.jsonl)")
    options = parser.parse_args(arguments)
    toy: bool = options.toy
    if not toy and not torch.cuda.is_available():
        parser.error("no CUDA device is visible, and its figures are what this measures. --toy runs on a CPU.")
    if toy and options.record == RECORD:
        parser.error("--toy shows that it runs, and its figures mean nothing: give it another --record.")
    if "check" not in options.step and (options.kernel or options.cases is not None):
        parser.error(f"--kernel and --cases are of the step check, which is not among {options.step}: add it.")
    if options.cases is not None and options.cases < 1:
        parser.error(f"--cases {options.cases}: at least one case is compared. Leave it out for 4.")
    device = torch.device("cpu" if toy else "cuda")
    common = {"toy": toy, **provenance(PACKAGES)}
    failed = 0
    for name in options.step:
        if name == "check":
            found = kernels.checks(device, options.kernel or list(KERNELS), options.cases or 4)
        else:
            found = STEPS[name](device, toy)
        failed += run(name, found, options.record, common, device)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
