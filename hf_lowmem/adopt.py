"""Trainers of others that are handed our config: each becomes ours of its class, so that every field is applied.

A config with our fields in `transformers.Trainer`, `trl.SFTTrainer` or a class derived from them would else be read by
a class that knows none of them. Whoever makes such a trainer gets an instance of a class that derives from theirs.
"""

import logging
from functools import cache
from typing import Any

from transformers import Trainer

from hf_lowmem.trainer import LowMemTrainer, LowMemTrainerMixin

logger = logging.getLogger(__name__)


@cache
def trainer_with_lowmem(trainer_class: type) -> type:
    """`trainer_class` with `LowMemTrainerMixin`; ours, where there is one for it."""
    if issubclass(trainer_class, LowMemTrainerMixin):
        return trainer_class
    ready = next((ours for ours in _ready(trainer_class) if issubclass(trainer_class, _host(ours))), None)
    if ready is not None and _host(ready) is trainer_class:
        return ready
    owner = next(c for c in trainer_class.__mro__ if "create_optimizer" in vars(c))
    if owner.__module__.partition(".")[0] not in ("transformers", "trl"):
        logger.warning(
            "%s.create_optimizer is not called with an optim of hf_lowmem, which makes the optimizer. Set optim to one "
            "of transformers', or put LowMemTrainerMixin behind your class.",
            owner.__name__,
        )
    # Behind the mixin stands what is theirs, so that what they override is called by it.
    bases = (LowMemTrainerMixin if ready in (None, LowMemTrainer) else ready, trainer_class)
    made: Any = type(f"LowMem{trainer_class.__name__}", bases, {"__module__": trainer_class.__module__})
    made.__doc__ = trainer_class.__doc__
    return made


def _ready(trainer_class: type) -> list[type]:
    if not any(c.__module__.startswith("trl.") for c in trainer_class.__mro__):
        return [LowMemTrainer]
    from hf_lowmem.dpo import LowMemDPOTrainer
    from hf_lowmem.sft import LowMemSFTTrainer

    return [LowMemSFTTrainer, LowMemDPOTrainer, LowMemTrainer]


def _host(ours: type) -> type:
    """The class of theirs that one of ours stands on."""
    return next(c for c in ours.__mro__ if issubclass(c, Trainer) and not issubclass(c, LowMemTrainerMixin))
