"""The meanings of `resume_from_checkpoint`: one folder, the newest that is whole, or that one if there is one."""

import logging
from pathlib import Path

from hf_lowmem.checkpoints.files import BadCheckpoint
from hf_lowmem.checkpoints.manifest import check_resumable, verify
from hf_lowmem.checkpoints.runs import last_complete

__all__ = ["choose"]

logger = logging.getLogger(__name__)


def choose(run: str, resume: str | bool) -> str | None:
    """The checkpoint that a run goes on from; None for a fresh start.

    Args:
        run: its folder.
        resume: a checkpoint's folder; True for the newest complete one; "auto" for that one, if there is one.

    Raises:
        BadCheckpoint: where the folder named is incomplete or damaged, with the last complete one.
        ValueError: for True, where there is none.
    """
    if resume is not True and resume != "auto":
        try:
            verify(str(resume))
            check_resumable(str(resume))
        except BadCheckpoint as error:
            last, _ = last_complete(Path(str(resume)).resolve().parent)
            offer = f"The last complete checkpoint is {last}." if last else "The run has no complete checkpoint."
            raise BadCheckpoint(f"{error} {offer}") from error
        return str(resume)
    last, passed = last_complete(run)
    for reason in passed:
        logger.warning("passed over: %s", reason)
    if last is None and resume is True:
        reasons = "".join(f"\n- {reason}" for reason in passed)
        raise ValueError(f"resume_from_checkpoint=True: there is no complete checkpoint in {run}.{reasons}")
    if last is None and passed:
        logger.warning('resume_from_checkpoint="auto": nothing in %s can be resumed from; the run begins anew', run)
    if last is not None:
        logger.info("resuming from %s", last)
    return None if last is None else str(last)
