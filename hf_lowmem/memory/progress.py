"""Progress of what keeps a user waiting before the first step: plans and searches, passes over data, conversions.

On a terminal a bar of tqdm's. Written into a file a bar is one long line of remains, so there a stage of a plan is a
line of its own, and what is counted shows nothing. `disable_tqdm` silences both.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

__all__ = ["counted", "others", "stages"]

logger = logging.getLogger(__name__)

VARIABLE = "TQDM_DISABLE"
WAIT = 1.0  # seconds before a bar appears: what is faster needs none


@contextmanager
def stages(label: str, *, shown: bool = True) -> Iterator[Callable[[str], None]]:
    """Function to be told of each stage as it begins. How many will follow is not known, so the bar counts.

    Args:
        label: what is under way.
        shown: whether anything is written; else the stages are in the log, at level INFO.
    """
    if not shown:
        yield lambda message: logger.info("%s: %s", label, message)
        return
    if not sys.stderr.isatty():
        yield lambda message: print(f"{label}: {message}", file=sys.stderr, flush=True)
        return
    with tqdm(desc=label, unit=" simulations", leave=False, file=sys.stderr) as bar:

        def tell(message: str) -> None:
            bar.set_postfix_str(message, refresh=False)
            bar.update()

        yield tell


def counted(items: Iterable[T], label: str, *, total: int | None = None, shown: bool = True) -> Iterable[T]:
    """The items, with a bar on a terminal.

    Args:
        total: number of items, where `len` does not say it.
    """
    hidden = not shown or not sys.stderr.isatty()
    return tqdm(items, desc=label, total=total, delay=WAIT, leave=False, disable=hidden, file=sys.stderr)


@contextmanager
def others(*, shown: bool) -> Iterator[None]:
    """Bars of a library that asks nobody but the environment, as TRL's pass for a reference does."""
    before = os.environ.get(VARIABLE)
    if not shown:
        os.environ[VARIABLE] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before
