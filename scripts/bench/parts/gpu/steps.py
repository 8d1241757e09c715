"""What a step of gpu_once.py is: cases that are measured one after the other, each row on disk before the next begins.

No exception ends a step: what fails is a row that says why. A case that the record has already, from the same device,
commit and versions, is not measured again, so that a run which was cut goes on where it stopped.
"""

import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from parts.gpu.timing import free
from parts.record import Row, append_row, read_rows

__all__ = ["Case", "run"]


class Case(NamedTuple):
    """One row to be: `what` it is, by name, and how its figures are had.

    theirs: whether it runs somebody else's package, which may be missing or fail without anything of ours being wrong.
    """

    what: Row
    measure: Callable[[], Row]
    theirs: bool = False


def run(step: str, cases: Iterable[Case], record: Path, common: Row, device: torch.device) -> int:
    """Measure what the record lacks, and return how many cases of ours failed or were wrong.

    Args:
        step: name of the step, in every row.
        cases: in the order in which they are wanted.
        record: the file that rows are added to.
        common: provenance of all rows.
    """
    failed = 0
    for case in cases:
        row = {"step": step, **case.what}
        if _is_done(row | common, record):
            continue
        free(device)
        try:
            row |= case.measure()
        except Exception as error:  # a package that is missing, too little memory, or a fault of ours: the row says it
            row |= {"error": f"{type(error).__name__}: {str(error)[:300]}"}
            lines = traceback.extract_tb(error.__traceback__)
            row |= {"where": f"{Path(lines[-1].filename).name}:{lines[-1].lineno}"}
        ours = not (case.theirs or "OutOfMemoryError" in row.get("error", ""))
        failed += bool(row.get("wrong")) or ("error" in row and ours)
        append_row(record, row | common)
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return failed


def _is_done(row: Row, record: Path) -> bool:
    """Whether the record has figures for a row of which only the case and the provenance are known."""
    return any("error" not in found and row.items() <= found.items() for found in read_rows(record))
