"""The learning rate of each step, as a trainer has it: `lowmem_schedule` in place of `lr_scheduler_type`."""

import dataclasses
from typing import TYPE_CHECKING, cast

import torch

from hf_lowmem.optim.schedules import PowerSpec, get_power_schedule
from hf_lowmem.training.schedule_fields import TOKENS, ScheduleArguments

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments
    from trl import SFTConfig

__all__ = ["Schedules"]


class Schedules:
    """The part of LowMemTrainerMixin that concerns `lowmem_schedule`."""

    args: object

    def _check_schedule(self) -> None:
        """Raise for a scheduler that was passed beside the field."""
        passed = cast("Trainer", self).lr_scheduler
        if self._power_spec() is not None and passed is not None:
            raise ValueError(
                f"lowmem_schedule='power' has no effect: a {type(passed).__name__} was passed in optimizers=. Drop it, "
                "or leave lowmem_schedule unset."
            )

    def _power_spec(self) -> PowerSpec | None:
        return self.args.lowmem_power_spec() if isinstance(self.args, ScheduleArguments) else None

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule that the fields ask for; the parent's where they leave it alone."""
        spec, trainer = self._power_spec(), cast("Trainer", self)
        if spec is None or trainer.lr_scheduler is not None:
            return cast("Trainer", super()).create_scheduler(num_training_steps, optimizer)
        args = cast("TrainingArguments", self.args)
        given = args.lr_scheduler_kwargs or {}
        if TOKENS not in given:  # packed: the batch may be another by now, and more processes
            rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            spec = dataclasses.replace(spec, tokens_per_step=rows * (cast("SFTConfig", args).max_length or 0))
        warmup = args.get_warmup_steps(num_training_steps)
        used = cast("torch.optim.Optimizer", trainer.optimizer) if optimizer is None else optimizer
        trainer.lr_scheduler = get_power_schedule(used, warmup, num_training_steps, spec, args.learning_rate)
        trainer._created_lr_scheduler = True
        return trainer.lr_scheduler
