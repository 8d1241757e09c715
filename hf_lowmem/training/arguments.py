"""The fields: a mixin for TrainingArguments and every config that derives from it.

`optim` takes our names beside HuggingFace's. TrainingArguments checks that field twice, as an enum of the command line
and in `__post_init__`, so the mixin redeclares it as a string and lends its parents a name they know while they check.
No private table of transformers is touched.

Every setting is checked here, at construction, before a model is loaded. A field that would do nothing is an error.
"""

import copy
import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, ClassVar, Self

from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_lowmem import rules
from hf_lowmem.codecs import CODECS
from hf_lowmem.memory.units import parse_bytes
from hf_lowmem.optim import ALL_METHODS, ZEROTH, check_spec, methods_with
from hf_lowmem.specs import (
    ACCUMULATIONS,
    EMBEDDING_RULES,
    LABELS,
    OPTIMIZER_FIELDS,
    PROJECTIONS,
    ActivationSpec,
    OptimSpec,
    check_choice,
    check_flag,
    check_integer,
    parse_options,
)
from hf_lowmem.training import section
from hf_lowmem.training.counts import check_counts
from hf_lowmem.training.host_fields import HostArguments
from hf_lowmem.training.matmul_fields import MatmulArguments
from hf_lowmem.training.named import NamedFields
from hf_lowmem.training.own_defaults import ADAM_DEFAULTS, assigned, open_fields, own_defaults, settle, take_section
from hf_lowmem.training.presets import AUTO, PRESETS, WEIGHTS, fill, is_about, said
from hf_lowmem.training.sampling import SampleArguments
from hf_lowmem.training.schedule_fields import ScheduleArguments

DEFAULT_OPTIM = str(OptimizerNames(TrainingArguments.__dataclass_fields__["optim"].default).value)

# What a section of an accelerate YAML (see section.py) may hold beside the fields of LowMemArguments.
SECTION_FIELDS = ("learning_rate", "weight_decay", "optim_args", "optim_target_modules")


@dataclass
class LowMemArguments(ScheduleArguments, SampleArguments, MatmulArguments, HostArguments, NamedFields):
    """Fields that make a training step fit in less memory; mix in before a TrainingArguments class.

    ```python
    args = LowMemSFTConfig("out", optim="apollo_mini", lowmem_state="int8", learning_rate=1e-4)
    ```

    Every field is `None` (or `False`) unless it is set, and a field that is set and could have no effect is refused.

    Raises:
        TypeError, ValueError: naming the field, its value, the reason and the remedy.
    """

    READER: ClassVar[str | None] = None  # the trainer that alone reads what a config adds to these fields

    lowmem: str | None = field(
        default=None,
        metadata={
            "help": "One word for several fields, which are filled in where they have their default: "
            + "; ".join(f"{name} ({said(preset)})" for name, preset in PRESETS.items())
            + f". With bf16 weights also lowmem_weights={WEIGHTS}. Or {AUTO}: measure the memory that is free (or take "
            "lowmem_budget), search the fastest settings that fit, and say what they cost. For SFT and DPO."
        },
    )
    optim: str = field(
        default=DEFAULT_OPTIM,
        metadata={
            "help": f"Optimizer: one of hf_lowmem's ({', '.join(ALL_METHODS)}) or any name that transformers knows "
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
            "bf16_sr (rounded at random, nothing more is kept), bf16_ecc (1 byte a parameter more, 24-bit weights) or "
            "int8_sr (linear layers and the embedding in int8, 1.03 bytes a parameter; needs lowmem_step_in_backward). "
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
    lowmem_embeddings: str | None = field(
        default=None,
        metadata={
            "help": f"Rule of embedding and output head, where an optim has one of its own for linear weights: "
            f"{', '.join(EMBEDDING_RULES)}. Default: {own_defaults('embeddings')}."
        },
    )
    lowmem_step_in_backward: bool = field(
        default=False,
        metadata={
            "help": "Update each weight during backward and free its gradient at once. Needs max_grad_norm=0, one "
            "process or FSDP2, and no fp16; with gradient accumulation lowmem_accumulation, but for galore and "
            "natural_galore. Only with an optim of hf_lowmem."
        },
    )
    lowmem_accumulation: str | None = field(
        default=None,
        metadata={
            "help": "How gradients are added up over gradient_accumulation_steps where lowmem_step_in_backward frees "
            "them: int8_sr (1.03 bytes a parameter, rounded at random; galore and natural_galore still add up their "
            "projections exactly). Default: not at all. Not under FSDP2. Only with an optim of hf_lowmem."
        },
    )
    lowmem_max_skipped_steps: int | None = field(
        default=None,
        metadata={
            "help": "End the training after so many steps in a row that have left out updates, because a gradient or "
            "an update was not finite. Default: never; `lowmem/skipped` in the log counts such steps. Only with an "
            "optim of hf_lowmem."
        },
    )
    lowmem_activations: str | None = field(
        default=None,
        metadata={
            "help": "What decoder layers keep for backward: exact (gradients equal bit for bit, about half), fp8 (a "
            "quarter), fp8_recompute (gate and up are computed again), checkpoint_fp8 (the layer's input alone), "
            "hooks_fp8 (for layers that are not recognised), stream, stream_fp8 (for long sequences: a layer runs by "
            "chunks of tokens), stream_fp8/4 (of every fourth layer the input); or layer by layer: "
            "fp8:0-11,checkpoint_fp8:12-. With any optim. Takes the place of gradient_checkpointing, which is then off "
            "unless it is set."
        },
    )
    lowmem_activations_stochastic: bool = field(
        default=False,
        metadata={"help": "Round at random where lowmem_activations compresses, so that errors average out."},
    )
    lowmem_stream_chunk: int | None = field(
        default=None,
        metadata={"help": "Tokens of a chunk in a streamed tier. Default: what fits in 1 GiB, a multiple of 256."},
    )
    lowmem_budget: str | None = field(
        default=None,
        metadata={
            "help": "Memory of one device, such as 24GiB, 24GB or 20000MiB. Before anything is set up, the settings "
            "that were left at their defaults (batch size and accumulation at constant product, checkpointing or "
            "lowmem_activations, optim, lowmem_state, lowmem_weights, lowmem_embeddings, lowmem_step_in_backward) are "
            "searched for the fastest that fits. For SFT and DPO."
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
        take_section(self, section_fields(), partial(inherited_default, type(self)))
        filled = fill(self, open_fields(self))
        self._lowmem_open = open_fields(self)
        try:
            self._settled(getattr(super(), "__post_init__", lambda: None))
        except ValueError as error:
            if is_about(filled, error):
                raise ValueError(f"{error} (lowmem={self.lowmem!r} sets {said(filled)}.)") from error
            raise

    def _settled(self, parents: Callable[[], None] = lambda: None) -> None:
        """Settle what is open and check all fields, each for itself and together.

        Args:
            parents: HuggingFace's own checks, where they have not run yet. They cannot start DeepSpeed, or read its
                file, everywhere; so what fields say by themselves is checked before.
        """
        name = self.optim.value if isinstance(self.optim, OptimizerNames) else self.optim
        check_choice("optim", name, [*ALL_METHODS, *(n.value for n in OptimizerNames)])
        ours = name in ALL_METHODS
        check_counts(self)
        check_flag("lowmem_step_in_backward", self.lowmem_step_in_backward)
        if self.lowmem_accumulation is not None:
            check_choice("lowmem_accumulation", self.lowmem_accumulation, ACCUMULATIONS)
        for part in ("offloaded", "activation_spec", "matmul_spec", "power_spec", "sample_share"):
            getattr(self, f"lowmem_{part}")()
        if self.lowmem_budget is not None:
            parse_bytes("lowmem_budget", self.lowmem_budget)
        if self.lowmem_max_skipped_steps is not None:
            check_integer("lowmem_max_skipped_steps", self.lowmem_max_skipped_steps, low=1)
        rules.check(self._facts(rules.Run.from_fields(self)))
        self._settle_checkpointing()
        settle(self)
        if ours:
            self.optim = "adamw_torch"  # a name that the parents accept while they check
        parents()
        if ours:
            self.optim = name
            check_spec(self.lowmem_optim_spec())
        rules.check(self._facts(rules.Run.from_arguments(self)))

    def _facts(self, run: rules.Run) -> rules.Run:
        """Facts that the class of these arguments adds to those of the fields."""
        return run

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        assigned(self, name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        settle(self)

    @property
    def lowmem_open(self) -> frozenset[str]:
        """Names of the fields that had their class's default when these arguments were made: the user left them open,
        so a search within `lowmem_budget` may set them."""
        return getattr(self, "_lowmem_open", frozenset())  # not there in arguments that an older version has saved

    def lowmem_replace(self, **values: Any) -> Self:
        """A copy with other values of fields, checked as at construction. These arguments stay as they are.

        `lowmem` can only be taken away (None), and then what it has filled in stays.

        Raises:
            TypeError, ValueError: where the values do not go together.
        """
        if values.get("lowmem") not in (None, self.lowmem):
            raise ValueError(
                f"lowmem_replace(lowmem={values['lowmem']!r}) would fill in nothing: presets do when arguments are "
                "made. Make new arguments with it, or replace the fields themselves."
            )
        made = copy.copy(self)
        mirrored = "gradient_checkpointing" in values and hasattr(made, "activation_checkpointing")  # the newer name
        if mirrored:
            values["activation_checkpointing"] = values["gradient_checkpointing"]
        for name, value in values.items():
            setattr(made, name, value)
        made._settled()
        if mirrored:
            vars(made)["activation_checkpointing"] = made.gradient_checkpointing
        return made

    def lowmem_settle(self, **values: Any) -> Self:
        """Like `lowmem_replace`, but every field then counts as chosen, so that a later search leaves it."""
        made = self.lowmem_replace(**values)
        made._lowmem_open = frozenset()
        return made

    def _settle_checkpointing(self) -> None:
        """Checkpointing that was left open: off with our tiers, else the class's own."""
        if self.gradient_checkpointing is None:
            needless = self.lowmem_activations is not None or self.optim in ZEROTH  # which keep nothing for backward
            self.gradient_checkpointing = not needless and inherited_default(type(self), "gradient_checkpointing")
            if getattr(self, "activation_checkpointing", False) is None:  # its newer name, of which nobody is warned
                self.activation_checkpointing = self.gradient_checkpointing

    def lowmem_activation_spec(self) -> ActivationSpec | None:
        """The activation tiers that these arguments ask for; None for none."""
        check_flag("lowmem_activations_stochastic", self.lowmem_activations_stochastic)
        if self.lowmem_activations is None:
            return None
        labels = {"stochastic": "lowmem_activations_stochastic", "chunk": "lowmem_stream_chunk"}
        return ActivationSpec(
            tiers=self.lowmem_activations,
            stochastic=self.lowmem_activations_stochastic,
            chunk=self.lowmem_stream_chunk,
            seed=getattr(self, "seed", None),  # of TrainingArguments, if it is mixed in
            offload="inputs" if self.lowmem_offload == "inputs" else None,
            labels=labels,
        )

    def lowmem_optim_spec(self) -> OptimSpec:
        """The optimizer that these arguments ask for, checked again, since fields may have been assigned."""
        asked: dict[str, Any] = {f: getattr(self, f"lowmem_{f}") for f in OPTIMIZER_FIELDS}
        args: Any = self  # the fields of TrainingArguments, if it is mixed in
        if hasattr(self, "learning_rate"):
            own = ALL_METHODS[self.optim].DEFAULTS
            betas = args.adam_beta1, args.adam_beta2
            unused = "eps" not in own and args.adam_epsilon == ADAM_DEFAULTS["adam_epsilon"]
            no_betas = "betas" not in own and betas == (ADAM_DEFAULTS["adam_beta1"], ADAM_DEFAULTS["adam_beta2"])
            asked |= {
                "lr": args.learning_rate,
                "betas": None if no_betas else betas,
                "eps": None if unused else args.adam_epsilon,
                "weight_decay": args.weight_decay,
                "target_modules": args.optim_target_modules,
                "seed": args.seed,
                "options": parse_options(args.optim_args, self.optim),
            }
        given = {k: v for k, v in asked.items() if v is not None}
        return OptimSpec(name=self.optim, labels=LABELS, **given)

    def set_optimizer(self, name: str | OptimizerNames = "adamw_torch", *args: Any, **kwargs: Any) -> "LowMemArguments":
        """TrainingArguments.set_optimizer, for our names too."""
        keywords = list(inspect.signature(TrainingArguments.set_optimizer).parameters)[2:]
        given = dict(zip(keywords, args, strict=False)) | kwargs
        ours = name in ALL_METHODS
        super().set_optimizer("adamw_torch" if ours else name, *args, **kwargs)  # type: ignore[misc]
        for f, keyword in zip(ADAM_DEFAULTS, ("beta1", "beta2", "epsilon"), strict=True):
            setattr(self, f, given.get(keyword))  # the parent's defaults are AdamW's, and nobody's choice
        if ours:
            self.optim = str(name)
            check_spec(self.lowmem_optim_spec())
        return self


def section_fields() -> list[str]:
    """Names that a section may hold."""
    return [*(f.name for f in fields(LowMemArguments)), *SECTION_FIELDS]


def inherited_default(config: type, name: str) -> Any:
    """The default that a field would have without our mixin."""
    above = config.__mro__[config.__mro__.index(LowMemArguments) + 1 :]
    fields = (getattr(c, "__dataclass_fields__", {}) for c in above)
    return next((of[name].default for of in fields if name in of), None)


@dataclass
class LowMemTrainingArguments(LowMemArguments, TrainingArguments):
    """`transformers.TrainingArguments` with the fields of `LowMemArguments`."""


trainers: weakref.WeakSet[Trainer] = weakref.WeakSet()  # all that are alive: no event hands a callback its own


def _make_trainer(cls: type, *args: Any, **kwargs: Any) -> Any:
    """`Trainer.__new__`: a trainer that is handed our config is ours of its class, or nobody would read the fields."""
    handed = any(isinstance(value, LowMemArguments) for value in (*args, *kwargs.values()))
    if handed or section.state.launched:
        from hf_lowmem.training.wrap import trainer_with_lowmem  # which stands above our trainers

        cls = trainer_with_lowmem(cls)
    made = object.__new__(cls)
    trainers.add(made)
    return made


_make_trainer.__signature__ = inspect.signature(Trainer.__init__)
Trainer.__new__ = _make_trainer
