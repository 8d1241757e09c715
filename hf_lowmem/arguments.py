"""The fields: a mixin for TrainingArguments and every config that derives from it.

`optim` takes our names beside HuggingFace's. TrainingArguments checks that field twice, as an enum of the command line
and in `__post_init__`, so the mixin redeclares it as a string and lends its parents a name they know while they check.
No private table of transformers is touched.

Every setting is checked here, at construction, before a model is loaded. A field that would do nothing is an error.
"""

from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any, TypeVar

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from hf_lowmem.optim import OPTIMIZERS, check_spec
from hf_lowmem.specs import OptimSpec, check_choice

DEFAULT_OPTIM = str(OptimizerNames(TrainingArguments.__dataclass_fields__["optim"].default).value)

# How OptimSpec's fields are called where a user sets them.
LABELS = {
    "name": "optim",
    "lr": "learning_rate",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "eps": "adam_epsilon",
    "state": "lowmem_state",
    "weights": "lowmem_weights",
    "rank": "lowmem_rank",
    "update_gap": "lowmem_update_gap",
    "scale": "lowmem_scale",
    "projection": "lowmem_projection",
    "target_modules": "optim_target_modules",
}
OPTIMIZER_FIELDS = ("state", "weights", "rank", "update_gap", "scale", "projection")

# Ready-made classes, with more than the mixin, for configs that have one. By name, found when asked for: those of TRL
# stand above this module, and TrainingArguments alone must not need trl.
READY = {"SFTConfig": "hf_lowmem.sft", "DPOConfig": "hf_lowmem.dpo", "TrainingArguments": "hf_lowmem.arguments"}


@dataclass
class LowMemArguments:
    """Fields that make a training step fit in less memory; mix in before a TrainingArguments class.

    ```python
    args = LowMemSFTConfig("out", optim="apollo_mini", lowmem_state="int8", learning_rate=1e-4)
    ```

    Every field is `None` (or `False`) unless it is set, and a field that is set and could have no effect is refused.

    Raises:
        TypeError, ValueError: naming the field, its value, the reason and the remedy.
    """

    optim: str = field(
        default=DEFAULT_OPTIM,
        metadata={
            "help": f"Optimizer: one of hf_lowmem's ({', '.join(OPTIMIZERS)}) or any name that transformers knows "
            "(see `OptimizerNames`), which keeps its meaning."
        },
    )
    lowmem_state: str | None = field(
        default=None,
        metadata={
            "help": "Codec of the optimizer's moments: fp32 (4 bytes a value), bf16 (2), int8 (1.02), fp8 (1.03) or "
            "fp8_expand (1.02). Default: fp32. Only with an optim of hf_lowmem."
        },
    )
    lowmem_weights: str | None = field(
        default=None,
        metadata={
            "help": "How updated weights are stored: keep (their own dtype, rounded to nearest). Default: keep. "
            "Only with an optim of hf_lowmem."
        },
    )
    lowmem_rank: int | None = field(
        default=None,
        metadata={
            "help": "Rows or columns that a low-rank optim keeps of each linear weight. Default: 256 for apollo, 1 "
            "for apollo_mini."
        },
    )
    lowmem_update_gap: int | None = field(
        default=None,
        metadata={"help": "Optimizer steps between two refreshes of the projection of a low-rank optim. Default: 200."},
    )
    lowmem_scale: float | None = field(
        default=None,
        metadata={
            "help": "Scale of a low-rank optim; apollo's update is multiplied by its square root. Default: 1 for "
            "apollo, 128 for apollo_mini."
        },
    )
    lowmem_projection: str | None = field(
        default=None, metadata={"help": "How a low-rank optim projects: random. Default: random."}
    )
    lowmem_step_in_backward: bool = field(
        default=False,
        metadata={"help": "Update each weight during backward and free its gradient at once. Not available yet."},
    )
    lowmem_activations: str | None = field(
        default=None,
        metadata={"help": "Tier in which activations are saved for backward. Not available yet."},
    )

    def __post_init__(self) -> None:
        name = self.optim.value if isinstance(self.optim, OptimizerNames) else self.optim
        check_choice("optim", name, [*OPTIMIZERS, *(n.value for n in OptimizerNames)])
        ours = name in OPTIMIZERS
        self._check_lowmem_fields(ours, name)
        self.optim = "adamw_torch" if ours else name  # a name that the parents accept while they check
        getattr(super(), "__post_init__", lambda: None)()
        if ours:
            self.optim = name
            check_spec(self.lowmem_optim_spec())

    def _check_lowmem_fields(self, ours: bool, name: str) -> None:
        if self.lowmem_step_in_backward is not False:
            raise ValueError(
                f"lowmem_step_in_backward={self.lowmem_step_in_backward!r} is not available in this version: "
                "gradients are kept until the step. Leave it unset; `optim='apollo_mini'` saves the optimizer's state."
            )
        if self.lowmem_activations is not None:
            raise ValueError(
                f"lowmem_activations={self.lowmem_activations!r} is not available in this version. Leave it unset, "
                "and use gradient_checkpointing=True to keep fewer activations."
            )
        if not ours:
            for option in OPTIMIZER_FIELDS:
                value = getattr(self, f"lowmem_{option}")
                if value is not None:
                    raise ValueError(
                        f"lowmem_{option}={value!r} has no effect with optim={name!r}, which is not one of "
                        f"hf_lowmem's. Leave it unset, or set optim to one of: {', '.join(OPTIMIZERS)}."
                    )
            return
        for other in ("optim_args", "fsdp", "deepspeed"):
            value = getattr(self, other, None)
            if value:
                reason = (
                    "has no effect: these options are fields (lowmem_rank, lowmem_scale, ...)"
                    if other == "optim_args"
                    else "is not supported yet: sharded state would not survive a checkpoint. Use DDP or one process"
                )
                raise ValueError(f"{other}={value!r} with optim={name!r} {reason}. Leave {other} unset.")

    def lowmem_optim_spec(self) -> OptimSpec:
        """What these arguments ask of our optimizer; checked again, since fields may have been assigned."""
        fields: dict[str, Any] = {f: getattr(self, f"lowmem_{f}") for f in OPTIMIZER_FIELDS}
        args: Any = self  # the fields of TrainingArguments, if it is mixed in
        if isinstance(self, TrainingArguments):
            fields |= {
                "lr": args.learning_rate,
                "betas": (args.adam_beta1, args.adam_beta2),
                "eps": args.adam_epsilon,
                "weight_decay": args.weight_decay,
                "target_modules": args.optim_target_modules,
                "seed": args.seed,
            }
        given = {k: v for k, v in fields.items() if v is not None}
        return OptimSpec(name=self.optim, labels=LABELS, **given)

    def set_optimizer(self, name: str | OptimizerNames = "adamw_torch", *args: Any, **kwargs: Any) -> "LowMemArguments":
        """As TrainingArguments.set_optimizer, for our names too."""
        if name not in OPTIMIZERS:
            return super().set_optimizer(name, *args, **kwargs)  # type: ignore[misc]
        super().set_optimizer("adamw_torch", *args, **kwargs)  # type: ignore[misc]
        self.optim = str(name)
        check_spec(self.lowmem_optim_spec())
        return self


@dataclass
class LowMemTrainingArguments(LowMemArguments, TrainingArguments):
    """`transformers.TrainingArguments` with the fields of `LowMemArguments`."""


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
    name = f"LowMem{config_class.__name__}"
    if config_class.__name__ in READY and config_class.__module__.split(".")[0] in ("transformers", "trl"):
        return getattr(import_module(READY[config_class.__name__]), name)
    namespace = {"__module__": __name__, "__doc__": config_class.__doc__, "__reduce__": _reduce}
    made = dataclass(type(name, (LowMemArguments, config_class), namespace))
    made._lowmem_base = config_class  # type: ignore[attr-defined]
    return made  # type: ignore[return-value]


def _reduce(self: Any) -> tuple[Any, ...]:
    return _restore, (self._lowmem_base, self.__dict__)


def _restore(base: type, values: dict[str, Any]) -> Any:
    made = object.__new__(with_lowmem(base))
    made.__dict__.update(values)
    return made


def __getattr__(name: str) -> Any:
    """The configs that need trl live beside their trainers, and are found here as well."""
    home = READY.get(name.removeprefix("LowMem"))
    if name.startswith("LowMem") and home not in (None, __name__):
        return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
