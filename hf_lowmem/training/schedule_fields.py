"""The field of `LowMemArguments` that concerns the learning rate of each step."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from hf_lowmem.optim.schedules import PowerSpec
from hf_lowmem.specs import check_choice

__all__ = ["SCHEDULES", "ScheduleArguments"]

SCHEDULES = ("power",)
LABEL = "lr_scheduler_kwargs: "
TOKENS = "tokens_per_step"


@dataclass
class ScheduleArguments:
    """See `LowMemArguments`, of which this is a part."""

    lowmem_schedule: str | None = field(
        default=None,
        metadata={
            "help": "power: the rate falls with the tokens trained on, min(learning_rate, batch a tokens^b), between "
            "warmup_steps and an exponential decay (Power Scheduler, for pre-training). Its lr_scheduler_kwargs: "
            "tokens_per_step (needed, but with packing), a=4, b=-0.51, decay_steps=0.1. Default: lr_scheduler_type. "
            "With any optim."
        },
    )

    def lowmem_power_spec(self) -> PowerSpec | None:
        """The Power schedule that these arguments ask for; None for none.

        Raises:
            TypeError, ValueError: naming the field, its value, the reason and the remedy.
        """
        if self.lowmem_schedule is None:
            return None
        check_choice("lowmem_schedule", self.lowmem_schedule, SCHEDULES)
        if not hasattr(self, "lr_scheduler_kwargs"):
            return None  # no TrainingArguments, of which a rule says more
        options: object = getattr(self, "lr_scheduler_kwargs", None) or {}
        if isinstance(options, str):  # from a command line, before HuggingFace has read it
            try:
                options = json.loads(options)
            except ValueError as error:
                raise ValueError(f"lr_scheduler_kwargs={options!r}: expected a JSON object ({error}).") from error
        if not isinstance(options, Mapping):
            raise TypeError(f"lr_scheduler_kwargs={options!r}: expected options by name, such as {{'a': 4}}.")
        given = cast("Mapping[str, object]", options)
        PowerSpec.check_names(LABEL, given)
        tokens = self._packed_tokens()
        if tokens is None and TOKENS not in given:
            raise ValueError(
                "lowmem_schedule='power' needs the tokens that a step trains on, which only packing=True with "
                f"max_length says beforehand. Set lr_scheduler_kwargs={{'{TOKENS}': N}}, in all processes and "
                "micro-batches together."
            )
        return PowerSpec.from_options(LABEL, given, tokens_per_step=tokens)

    def _packed_tokens(self) -> int | None:
        """Tokens of a step whose rows are packed full, by what is known so far; None where they are not."""
        length = getattr(self, "max_length", None)
        if not getattr(self, "packing", False) or not length:
            return None
        rows = getattr(self, "per_device_train_batch_size", 1) * getattr(self, "gradient_accumulation_steps", 1)
        return rows * length
