"""Classes of others with ours: a config with the fields, and a trainer that reads them.

A config with our fields in `transformers.Trainer`, `trl.SFTTrainer` or a class derived from them would be read by a
class that knows none of them. So a trainer that is handed one is an instance of a class of ours that derives from
theirs (see the end of hf_lowmem/training/arguments.py): every field is applied, in each trainer there is.
"""

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from transformers import Trainer, TrainingArguments

from hf_lowmem.training.arguments import LowMemArguments, LowMemTrainingArguments
from hf_lowmem.training.mixin import LowMemTrainer, LowMemTrainerMixin

logger = logging.getLogger(__name__)

Config = TypeVar("Config", bound=TrainingArguments)


@cache
def with_lowmem(config_class: type[Config]) -> type[Config]:
    """`config_class` with the fields of `LowMemArguments`, as a new dataclass named "LowMem…".

    ```python
    LowMemGRPOConfig = with_lowmem(trl.GRPOConfig)
    class LowMemGRPOTrainer(LowMemTrainerMixin, trl.GRPOTrainer): ...
    ```

    For TrainingArguments, SFTConfig and DPOConfig this is the ready class. Instances can be pickled, as
    `training_args.bin` needs.

    Raises:
        TypeError: where it is not a class derived from TrainingArguments.
    """
    if not (isinstance(config_class, type) and issubclass(config_class, TrainingArguments)):
        raise TypeError(
            f"with_lowmem({config_class!r}): expected a class derived from transformers.TrainingArguments, such as "
            "trl.GRPOConfig."
        )
    if issubclass(config_class, LowMemArguments):
        return config_class
    ready = _ready_config(config_class)
    if ready is not None:
        return ready
    namespace = {"__module__": __name__, "__doc__": config_class.__doc__, "__reduce__": _reduce}
    made = dataclass(type(f"LowMem{config_class.__name__}", (LowMemArguments, config_class), namespace))
    made._lowmem_base = config_class  # type: ignore[attr-defined]
    return made  # type: ignore[return-value]


def _ready_config(config_class: type) -> type | None:
    """Ours, with more than the mixin, for a config that has one. Without trl for one that is none of trl's."""
    if config_class is TrainingArguments:
        return LowMemTrainingArguments
    if not config_class.__module__.startswith("trl."):
        return None
    from trl import DPOConfig, SFTConfig

    from hf_lowmem.training.dpo import LowMemDPOConfig
    from hf_lowmem.training.sft import LowMemSFTConfig

    return {SFTConfig: LowMemSFTConfig, DPOConfig: LowMemDPOConfig}.get(config_class)


def _reduce(self: Any) -> tuple[Any, ...]:
    return _restore, (self._lowmem_base, self.__dict__)


def _restore(base: type, values: dict[str, Any]) -> Any:
    made: Any = object.__new__(with_lowmem(base))
    made.__setstate__(values)
    return made


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
    from hf_lowmem.training.dpo import LowMemDPOTrainer
    from hf_lowmem.training.sft import LowMemSFTTrainer

    return [LowMemSFTTrainer, LowMemDPOTrainer, LowMemTrainer]


def _host(ours: type) -> type:
    """The class of theirs that one of ours stands on."""
    return next(c for c in ours.__mro__ if issubclass(c, Trainer) and not issubclass(c, LowMemTrainerMixin))
