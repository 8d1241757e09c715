"""The fields: a mixin for TrainingArguments and every config that derives from it.

`optim` takes our names beside HuggingFace's. TrainingArguments checks that field twice, as an enum of the command line
and in `__post_init__`, so the mixin redeclares it as a string and lends its parents a name they know while they check.
No private table of transformers is touched.

Every setting is checked here, at construction, before a model is loaded. A field that would do nothing is an error.
"""

import copy
import logging
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from importlib import import_module
from typing import Any, Self, TypeVar

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from hf_lowmem import section
from hf_lowmem.codecs import CODECS
from hf_lowmem.compatibility import (
    LABELS,
    OPTIMIZER_FIELDS,
    check_fsdp_spec,
    check_fsdp_version,
    check_optimizer_fields,
    check_step_in_backward,
    check_tiers,
    check_zero_config,
    fsdp_asked,
    parse_options,
)
from hf_lowmem.memory.units import parse_bytes
from hf_lowmem.optim import OPTIMIZERS, check_spec, methods_with
from hf_lowmem.specs import PROJECTIONS, ActivationSpec, OptimSpec, check_choice, check_flag

logger = logging.getLogger(__name__)

DEFAULT_OPTIM = str(OptimizerNames(TrainingArguments.__dataclass_fields__["optim"].default).value)

# What a section of an accelerate YAML (see hf_lowmem/section.py) may hold beside the fields of LowMemArguments.
SECTION_FIELDS = ("learning_rate", "weight_decay", "optim_args", "optim_target_modules")

# Fields of HuggingFace whose default is the method's own with an optim of ours, and HuggingFace's with any other.
ADAM_DEFAULTS = {
    f: TrainingArguments.__dataclass_fields__[f].default for f in ("adam_beta1", "adam_beta2", "adam_epsilon")
}


def own_defaults(option: str) -> str:
    """The defaults of an option by method, for a help text: "256 (apollo), 1 (apollo_mini)"."""
    by_value: dict[Any, list[str]] = {}
    for name in methods_with(option):
        by_value.setdefault(OPTIMIZERS[name].DEFAULTS[option], []).append(name)
    return ", ".join(f"{value} ({', '.join(names)})" for value, names in by_value.items())


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
    adam_beta1: float | None = field(
        default=None,
        metadata={"help": "Decay rate of the first moment. Default: 0.9; with an optim of hf_lowmem, its own."},
    )
    adam_beta2: float | None = field(
        default=None,
        metadata={"help": "Decay rate of the second moment. Default: 0.999; with an optim of hf_lowmem, its own."},
    )
    adam_epsilon: float | None = field(
        default=None,
        metadata={
            "help": "Added to the root of the second moment. Default: 1e-8; with an optim of hf_lowmem, its own."
        },
    )
    lowmem_state: str | None = field(
        default=None,
        metadata={
            "help": "What stores the optimizer's moments: 8bit (the recommended pair, 2.07 bytes a parameter), "
            f"or a codec: {', '.join(CODECS)}; or two codecs, for the first and the second moment, such as "
            "int8,fp8_expand. Default: fp32. Only with an optim of hf_lowmem."
        },
    )
    lowmem_weights: str | None = field(
        default=None,
        metadata={
            "help": "How updated weights are stored: keep (their own dtype, rounded to nearest); for bf16 weights also "
            "bf16_sr (rounded at random, nothing more is kept) or bf16_ecc (1 byte a parameter more, 24-bit weights). "
            "Default: keep. Only with an optim of hf_lowmem."
        },
    )
    lowmem_rank: int | None = field(
        default=None,
        metadata={
            "help": "Rows or columns that a low-rank optim keeps of each linear weight. Default: "
            f"{own_defaults('rank')}."
        },
    )
    lowmem_update_gap: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps between two refreshes of the projection of a low-rank optim, or of soap's basis. "
            f"Default: {own_defaults('update_gap')}."
        },
    )
    lowmem_scale: float | None = field(
        default=None,
        metadata={
            "help": "Scale of a low-rank optim; apollo's update is multiplied by its square root. Default: "
            f"{own_defaults('scale')}."
        },
    )
    lowmem_projection: str | None = field(
        default=None,
        metadata={
            "help": f"How a low-rank optim projects: {', '.join(PROJECTIONS)}. Default: {own_defaults('projection')}."
        },
    )
    lowmem_rotate: bool | None = field(
        default=None,
        metadata={
            "help": "Rotate the moments into the new basis when it is refreshed. Default: False. Only with: "
            f"{', '.join(methods_with('rotate'))}."
        },
    )
    lowmem_step_in_backward: bool = field(
        default=False,
        metadata={
            "help": "Update each weight during backward and free its gradient at once. Needs max_grad_norm=0, one "
            "process or FSDP2, and no fp16; with gradient accumulation only for galore and natural_galore. Only with "
            "an optim of hf_lowmem."
        },
    )
    lowmem_activations: str | None = field(
        default=None,
        metadata={
            "help": "What decoder layers keep for backward: exact (gradients equal bit for bit, about half), fp8 (a "
            "quarter), fp8_recompute (gate and up are computed again), checkpoint_fp8 (the layer's input alone), "
            "hooks_fp8 (for layers that are not recognised); or layer by layer: fp8:0-11,checkpoint_fp8:12-. With any "
            "optim. Takes the place of gradient_checkpointing, which is then off unless it is set."
        },
    )
    lowmem_activations_stochastic: bool = field(
        default=False,
        metadata={"help": "Round at random where lowmem_activations compresses, so that errors average out."},
    )
    lowmem_budget: str | None = field(
        default=None,
        metadata={
            "help": "Memory of one device, such as 24GiB, 24GB or 20000MiB. Before anything is set up, the settings "
            "that were left at their defaults (batch size and accumulation at constant product, checkpointing or "
            "lowmem_activations, optim, lowmem_state, lowmem_weights, lowmem_step_in_backward) are searched for the "
            "fastest that fits. For SFT and DPO."
        },
    )
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Keep each layer's input only and compute the layer again in backward. Default: that of the class "
            "without lowmem (True for TRL's); False with lowmem_activations."
        },
    )

    def __post_init__(self) -> None:
        self._take_section()
        self._lowmem_open = open_fields(self)
        self._check_budget()
        name = self.optim.value if isinstance(self.optim, OptimizerNames) else self.optim
        check_choice("optim", name, [*OPTIMIZERS, *(n.value for n in OptimizerNames)])
        ours = name in OPTIMIZERS
        check_optimizer_fields(self, ours, name)
        self._settle_checkpointing()
        self._settle_adam(ours, name)
        self.optim = "adamw_torch" if ours else name  # a name that the parents accept while they check
        getattr(super(), "__post_init__", lambda: None)()
        check_fsdp_version(self, ours, name)
        check_zero_config(self, ours, name)
        if ours:
            self.optim = name
            check_spec(self.lowmem_optim_spec())
            check_fsdp_spec(self.lowmem_optim_spec(), bool(getattr(self, "fsdp", None)))
            self._check_step_in_backward()
        if self.lowmem_activations is not None and getattr(self, "n_gpu", 1) > 1:
            raise ValueError(
                f"lowmem_activations={self.lowmem_activations!r} with {self.n_gpu} visible GPUs in one process: "  # type: ignore[attr-defined]
                "DataParallel's replicas would share the first one's layers. Make one GPU visible, or start a process "
                "a GPU with `accelerate launch` or `torchrun`."
            )

    def _check_budget(self) -> None:
        if self.lowmem_budget is None:
            return
        parse_bytes("lowmem_budget", self.lowmem_budget)
        if not isinstance(self, TrainingArguments):
            raise ValueError(
                f"lowmem_budget={self.lowmem_budget!r} has no effect in {type(self).__name__}: a loop of your own "
                "cannot be planned. Leave it unset, and choose the settings with `hf-lowmem plan --budget`."
            )

    def _settle_adam(self, ours: bool, name: str) -> None:
        own = OPTIMIZERS[name].DEFAULTS if ours else {}
        betas = own.get("betas", (ADAM_DEFAULTS["adam_beta1"], ADAM_DEFAULTS["adam_beta2"]))
        defaults = {"adam_beta1": betas[0], "adam_beta2": betas[1], "adam_epsilon": own.get("eps")}
        for f, default in defaults.items():
            if getattr(self, f) is None:
                setattr(self, f, ADAM_DEFAULTS[f] if default is None else default)

    @property
    def lowmem_open(self) -> frozenset[str]:
        """Names of the fields that had their class's default when these arguments were made: the user left them open,
        so a search within `lowmem_budget` may set them."""
        return getattr(self, "_lowmem_open", frozenset())  # not there in arguments that an older version has saved

    def lowmem_replace(self, **values: Any) -> Self:
        """A copy with other values of fields, checked as at construction. These arguments stay as they are.

        Raises:
            TypeError, ValueError: where the values do not go together.
        """
        made = copy.copy(self)
        if "optim" in values:  # betas and eps that were not given are the new method's own
            values = {f: None for f in ADAM_DEFAULTS if f in self.lowmem_open} | values
        mirrored = "gradient_checkpointing" in values and hasattr(made, "activation_checkpointing")  # the newer name
        if mirrored:
            values["activation_checkpointing"] = values["gradient_checkpointing"]
        for name, value in values.items():
            setattr(made, name, value)
        ours = made.optim in OPTIMIZERS
        check_optimizer_fields(made, ours, made.optim)
        made._settle_checkpointing()
        if mirrored:
            vars(made)["activation_checkpointing"] = made.gradient_checkpointing
        made._settle_adam(ours, made.optim)
        check_fsdp_version(made, ours, made.optim)
        check_zero_config(made, ours, made.optim)
        if ours:
            check_spec(made.lowmem_optim_spec())
            check_fsdp_spec(made.lowmem_optim_spec(), fsdp_asked(made))
            made._check_step_in_backward()
        return made

    def lowmem_settle(self, **values: Any) -> Self:
        """As `lowmem_replace`, the answer to a search: nothing is open any more."""
        made = self.lowmem_replace(**values)
        made._lowmem_open = frozenset()
        return made

    def _take_section(self) -> None:
        """Fields that have their default value take what HF_LOWMEM_CONFIG says of them."""
        label, known = f"{section.VARIABLE} ({section.KEY})", section_fields()
        for name, value in section.from_env().items():
            check_choice(f"{label}: field", name, known)
            own = type(self).__dataclass_fields__.get(name)
            if own is None or getattr(self, name) == value:
                continue
            if getattr(self, name) != own.default:
                logger.info("%s: %s=%r gives way to %r, which was set here", label, name, value, getattr(self, name))
                continue
            setattr(self, name, value)

    def _settle_checkpointing(self) -> None:
        """Checkpointing or our tiers: inside a checkpoint nothing is left to compress."""
        spec = self.lowmem_activation_spec()
        checkpointing = self.gradient_checkpointing or getattr(self, "activation_checkpointing", None)
        if spec is None:
            if self.lowmem_activations_stochastic:
                raise ValueError(
                    "lowmem_activations_stochastic=True has no effect without lowmem_activations. Leave it unset, or "
                    "set lowmem_activations='fp8'."
                )
            if self.gradient_checkpointing is None:
                self.gradient_checkpointing = inherited_default(type(self), "gradient_checkpointing")
            return
        self.gradient_checkpointing = self.gradient_checkpointing or False
        check_tiers(self, checkpointing)

    def lowmem_activation_spec(self) -> ActivationSpec | None:
        """What these arguments ask of the model's layers."""
        check_flag("lowmem_activations_stochastic", self.lowmem_activations_stochastic)
        if self.lowmem_activations is None:
            return None
        labels = {"stochastic": "lowmem_activations_stochastic"}
        return ActivationSpec(
            tiers=self.lowmem_activations, stochastic=self.lowmem_activations_stochastic, labels=labels
        )

    def _check_step_in_backward(self) -> None:
        """What needs all gradients at once is refused."""
        if self.lowmem_step_in_backward:
            check_step_in_backward(self)

    def lowmem_optim_spec(self) -> OptimSpec:
        """What these arguments ask of our optimizer; checked again, since fields may have been assigned."""
        asked: dict[str, Any] = {f: getattr(self, f"lowmem_{f}") for f in OPTIMIZER_FIELDS}
        args: Any = self  # the fields of TrainingArguments, if it is mixed in
        if hasattr(self, "learning_rate"):
            own = OPTIMIZERS[self.optim].DEFAULTS
            asked |= {
                "lr": args.learning_rate,
                "betas": (args.adam_beta1, args.adam_beta2),
                "eps": args.adam_epsilon
                if "eps" in own or args.adam_epsilon != ADAM_DEFAULTS["adam_epsilon"]
                else None,
                "weight_decay": args.weight_decay,
                "target_modules": args.optim_target_modules,
                "seed": args.seed,
                "options": parse_options(args.optim_args, self.optim),
            }
        given = {k: v for k, v in asked.items() if v is not None}
        return OptimSpec(name=self.optim, labels=LABELS, **given)

    def set_optimizer(self, name: str | OptimizerNames = "adamw_torch", *args: Any, **kwargs: Any) -> "LowMemArguments":
        """As TrainingArguments.set_optimizer, for our names too."""
        if name not in OPTIMIZERS:
            return super().set_optimizer(name, *args, **kwargs)  # type: ignore[misc]
        super().set_optimizer("adamw_torch", *args, **kwargs)  # type: ignore[misc]
        self.optim = str(name)
        check_spec(self.lowmem_optim_spec())
        return self


def open_fields(args: Any) -> frozenset[str]:
    """Names of the fields of a config that have their class's default."""
    return frozenset(
        f.name
        for f in fields(args)
        if getattr(args, f.name, MISSING) == (f.default if f.default_factory is MISSING else f.default_factory())
    )


def section_fields() -> list[str]:
    """Names that a section may hold."""
    return [*(f.name for f in fields(LowMemArguments)), *SECTION_FIELDS]


def inherited_default(config: type, name: str) -> Any:
    """The default that a field would have without our mixin."""
    above = config.__mro__[config.__mro__.index(LowMemArguments) + 1 :]
    return next(
        (c.__dataclass_fields__[name].default for c in above if name in getattr(c, "__dataclass_fields__", {})), None
    )


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
