"""A run whose updates are left out says so: in its log, its warnings and its card; and it ends where a field says when.

An optimizer of ours leaves out what is not finite (see optim/guard.py), so a run whose every gradient is NaN would end
like any other, with the weights that it began with. The optimizer counts on the device. Here the number is read where
the Trainer waits for the device anyway, in its logging steps.
"""

import logging
from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lowmem.runs.history import SKIPPED

__all__ = ["FIELD", "KEY", "StopWhenSkipped", "add_skipped", "ours_in"]

logger = logging.getLogger(__name__)

KEY = SKIPPED
FIELD = "lowmem_max_skipped_steps"


def ours_in(optimizer: Any) -> Any:
    """The optimizer that counts, inside of what accelerate or an engine has made of it; None where there is none."""
    for _ in range(4):  # wrappers in wrappers
        if optimizer is None or isinstance(getattr(type(optimizer), "skipped", None), FunctionType):
            return optimizer
        optimizer = getattr(optimizer, "optimizer", None)
    return None


def add_skipped(logs: dict[str, Any], optimizer: Any, told: int) -> int:
    """Add to a row of metrics how many steps have left out updates, if any have, and warn of new ones.

    Args:
        told: the number that was warned of last.

    Returns the number now.
    """
    ours = ours_in(optimizer)
    if ours is None or any(name.startswith(("eval_", "test_")) for name in logs):
        return told
    found = ours.skipped()
    if found.steps:
        logs[KEY] = found.steps
    if found.steps > told:
        logger.warning("%s", warning_of(found))
    return found.steps


def warning_of(found: Any) -> str:
    """Warning about an optimizer's `skipped()`: the counts, and what a user can do."""
    last = f", the last {found.in_a_row} of them in a row" if found.in_a_row else ""
    return (
        f"{found.steps} steps have left out updates so far ({found.updates} updates of single parameters){last}: a "
        "gradient, or the update itself, was NaN, infinite or above 1e15. Those weights and their states stayed as "
        "they were. Look at the loss and the data of these steps, or lower learning_rate; "
        f"{FIELD}=N ends a run after N such steps in a row."
    )


class StopWhenSkipped(TrainerCallback):
    """Ends a training after `limit` steps in a row that have left out updates.

    So many steps need so many steps: after a look at the number it is not looked at again before it can have reached
    the limit, and the end is exact all the same.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._due = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._due = state.global_step + 1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        ours = ours_in(kw.get("optimizer"))
        if ours is None or state.global_step < self._due:
            return
        found = ours.skipped()
        in_a_row = found.in_a_row
        if args.world_size > 1 and dist.is_initialized():  # all processes end, or none
            most = torch.tensor(in_a_row, dtype=torch.int64, device=args.device)
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
            in_a_row = int(most)
        self._due = state.global_step + max(1, self.limit - in_a_row)
        if in_a_row >= self.limit:
            control.should_training_stop = True
            logger.error(
                "%s=%d: training ends at step %d, after %d steps in a row that have left out updates. %s",
                FIELD, self.limit, state.global_step, in_a_row, warning_of(found),
            )  # fmt: skip
