"""The fields: a mixin for TrainingArguments and every config that derives from it.

`optim` takes our names beside HuggingFace's. TrainingArguments checks that field twice, as an enum of the command line
and in `__post_init__`, so the mixin redeclares it as a string and lends its parents a name they know while they check.
No private table of transformers is touched.

Every setting is checked here, at construction, before a model is loaded. A field that would do nothing is an error.
"""

import ast
import logging
import os
from dataclasses import dataclass, field, fields
from functools import cache
from importlib import import_module
from typing import Any, TypeVar

from torch import Size
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from hf_lowmem import section
from hf_lowmem.codecs import CODECS
from hf_lowmem.optim import OPTIMIZERS, check_spec, methods_with
from hf_lowmem.optim.release import accumulation_refused
from hf_lowmem.specs import PROJECTIONS, ActivationSpec, OptimSpec, check_choice, check_flag

logger = logging.getLogger(__name__)

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
    "rotate": "lowmem_rotate",
    "options": "optim_args",
    "target_modules": "optim_target_modules",
}
OPTIMIZER_FIELDS = ("state", "weights", "rank", "update_gap", "scale", "projection", "rotate")

# What a section of an accelerate YAML (see hf_lowmem/section.py) may hold beside the fields of LowMemArguments.
SECTION_FIELDS = ("learning_rate", "weight_decay", "optim_args", "optim_target_modules")

FSDP1_REFUSED = (
    "FSDP1 flattens weights, so rows and matrices, and with them the layout of states, are lost. Set "
    "fsdp_config={'version': 2} (FSDP2; accelerate: fsdp_version: 2), or use DDP."
)
DEEPSPEED_REFUSED = (
    "ZeRO flattens weights, so low-rank methods cannot see matrices; methods that work element by element could follow "
    "it, but its checkpoints cut and pad every state as if it had the weights' size, which scales have not."
)

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
            "help": "What stores the optimizer's moments: 8bit (the recommended pair, 2.06 bytes a parameter), "
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
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Keep each layer's input only and compute the layer again in backward. Default: that of the class "
            "without lowmem (True for TRL's); False with lowmem_activations."
        },
    )

    def __post_init__(self) -> None:
        self._take_section()
        name = self.optim.value if isinstance(self.optim, OptimizerNames) else self.optim
        check_choice("optim", name, [*OPTIMIZERS, *(n.value for n in OptimizerNames)])
        ours = name in OPTIMIZERS
        self._check_lowmem_fields(ours, name)
        self._settle_checkpointing()
        own = OPTIMIZERS[name].DEFAULTS if ours else {}
        betas = own.get("betas", (ADAM_DEFAULTS["adam_beta1"], ADAM_DEFAULTS["adam_beta2"]))
        defaults = {"adam_beta1": betas[0], "adam_beta2": betas[1], "adam_epsilon": own.get("eps")}
        for f, default in defaults.items():
            if getattr(self, f) is None:
                setattr(self, f, ADAM_DEFAULTS[f] if default is None else default)
        self.optim = "adamw_torch" if ours else name  # a name that the parents accept while they check
        getattr(super(), "__post_init__", lambda: None)()
        self._check_fsdp_version(ours, name)
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

    def _check_lowmem_fields(self, ours: bool, name: str) -> None:
        check_flag("lowmem_step_in_backward", self.lowmem_step_in_backward)
        if not ours:
            for option in (*OPTIMIZER_FIELDS, "step_in_backward"):
                value = getattr(self, f"lowmem_{option}")
                if value is not None and value is not False:
                    raise ValueError(
                        f"lowmem_{option}={value!r} has no effect with optim={name!r}, which is not one of "
                        f"hf_lowmem's. Leave it unset, or set optim to one of: {', '.join(OPTIMIZERS)}."
                    )
            return
        value = getattr(self, "deepspeed", None)
        if value:
            raise ValueError(
                f"deepspeed={value!r} with optim={name!r}: {DEEPSPEED_REFUSED} Set fsdp=True (FSDP2) instead, or use "
                "DDP, and leave deepspeed unset."
            )

    def _check_fsdp_version(self, ours: bool, name: str) -> None:
        """FSDP1 is refused; the parents have made `fsdp_config` a dict by now. The trainer sees what accelerate set."""
        config = getattr(self, "fsdp_config", None) or {}
        asked = f"optim={name!r}" if ours else f"lowmem_activations={self.lowmem_activations!r}"
        if getattr(self, "fsdp", None) and (ours or self.lowmem_activations is not None):
            version = config.get("version", 2)
            if int(version) != 2 or config.get("xla"):
                what = "fsdp_config['xla']=True" if config.get("xla") else f"fsdp_config['version']={version!r}"
                raise ValueError(f"{what} with {asked}: {FSDP1_REFUSED}")

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
        tiers = f"lowmem_activations={self.lowmem_activations!r}"
        inside = "inside it nothing is left for a tier to compress"
        for setting, value, reason, remedy in (
            ("gradient_checkpointing", checkpointing, inside, "Leave it unset; 'checkpoint_fp8' is a tier"),
            ("activation_offloading", "activation_offloading", inside, "Set one of the two"),
            (
                "use_liger_kernel",
                "use_liger_kernel",
                "its norms and MLPs keep tensors in functions of their own, out of reach",
                "Set one of the two",
            ),
            ("deepspeed", "deepspeed", "it was not tested with its weights", "Set fsdp=True (FSDP2), or use DDP"),
        ):
            found = getattr(self, value, None) if isinstance(value, str) else value
            if found:
                raise ValueError(f"{setting}={found!r} cannot be combined with {tiers}: {reason}. {remedy}.")

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
        if not self.lowmem_step_in_backward:
            return
        args: Any = self
        for setting, value, reason, remedy in (
            (
                "max_grad_norm",
                args.max_grad_norm,
                "the global norm needs every gradient before the first update",
                "Set max_grad_norm=0; apollo, apollo_mini and fira limit the growth of each update by themselves",
            ),
            ("fp16", args.fp16, "loss scaling checks every gradient before the first update", "Use bf16=True"),
            (
                "torch_compile",
                args.torch_compile,
                "a compiled backward pass hands over all gradients at its end, so nothing would be freed",
                "Leave torch_compile unset",
            ),
            (
                "gradient_checkpointing_kwargs",
                (args.gradient_checkpointing_kwargs or {}).get("use_reentrant") and args.gradient_checkpointing_kwargs,
                "a reentrant checkpoint may hand over one weight's gradient in parts",
                "Set use_reentrant to False",
            ),
            (
                "world_size",
                args.world_size if args.world_size > 1 and not fsdp_asked(args) else 0,
                "DDP averages gradients after each one's update",
                "Set fsdp=True (FSDP2), train in one process, or leave lowmem_step_in_backward unset",
            ),
            ("n_gpu", args.n_gpu if args.n_gpu > 1 else 0, "DataParallel has replicas", "Make one GPU visible"),
        ):
            if value:
                raise ValueError(
                    f"{setting}={value!r} cannot be combined with lowmem_step_in_backward=True: {reason}. {remedy}."
                )
        steps = args.gradient_accumulation_steps
        if steps > 1 and not OPTIMIZERS[self.optim].ACCUMULATES:
            raise ValueError(accumulation_refused(f"gradient_accumulation_steps={steps!r}", self.optim))

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


def section_fields() -> list[str]:
    """Names that a section may hold."""
    return [*(f.name for f in fields(LowMemArguments)), *SECTION_FIELDS]


def fsdp_asked(args: Any) -> bool:
    """Whether these arguments, or accelerate's launcher, will shard the model."""
    launched = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes")
    return launched or bool(getattr(args, "fsdp", None))


def check_fsdp_spec(spec: OptimSpec, fsdp: bool) -> None:
    """Raise for a method, or a projection, that cannot work on weights of which each process has some rows.

    Raises:
        ValueError: with the remedy.
    """
    if not fsdp:
        return
    cls = OPTIMIZERS[spec.name]
    group = cls.resolve(spec) | {"rank": 1}
    reason = cls.unsharded_only(Size((2, 2)), group)
    if reason is not None:
        raise ValueError(reason.replace("projection=", f"{spec.label('projection')}=", 1))


def inherited_default(config: type, name: str) -> Any:
    """The default that a field would have without our mixin."""
    above = config.__mro__[config.__mro__.index(LowMemArguments) + 1 :]
    return next(
        (c.__dataclass_fields__[name].default for c in above if name in getattr(c, "__dataclass_fields__", {})), None
    )


def parse_options(optim_args: str | None, name: str) -> dict[str, Any]:
    """HuggingFace's `optim_args`, "key=value,key=value", as the options that a method alone understands.

    Raises:
        ValueError: for a pair without "=", or for what has a field of its own.
    """
    options: dict[str, Any] = {}
    for pair in filter(None, (optim_args or "").replace(" ", "").split(",")):
        key, equals, text = pair.partition("=")
        if not equals or not key or not text:
            raise ValueError(f"optim_args={optim_args!r}: {pair!r} is not of the form key=value.")
        if key in {f.name for f in fields(OptimSpec)}:
            raise ValueError(
                f"optim_args={optim_args!r}: with optim={name!r} this is a field of its own. Set "
                f"{LABELS.get(key, 'adam_beta1 and adam_beta2' if key == 'betas' else key)} instead."
            )
        try:
            options[key] = ast.literal_eval(text.title() if text.lower() in ("true", "false") else text)
        except (ValueError, SyntaxError):
            options[key] = text
    return options


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
