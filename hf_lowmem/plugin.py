"""LowMemPlugin: the fields for a training loop of one's own on accelerate.

accelerate has no door for a third party's optimizer or for changes to a model before it is wrapped, so the plugin
stands beside the Accelerator and does, in the right order, what a Trainer's mixin does elsewhere: convert the model's
layers, build the optimizer on its named parameters, then let the Accelerator prepare everything in one call, as FSDP2
needs.

Its fields are those of `LowMemArguments`, so a run moves between a Trainer and a loop without renaming anything, and
one section of an accelerate YAML serves both.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.optim import Optimizer

from hf_lowmem import section, zero
from hf_lowmem.activations import Report, convert
from hf_lowmem.arguments import LowMemArguments, section_fields
from hf_lowmem.compatibility import check_fsdp_spec
from hf_lowmem.optim import OPTIMIZERS, StepInBackward, elementwise, from_spec
from hf_lowmem.optim.release import accumulation_refused
from hf_lowmem.skips import FIELD
from hf_lowmem.specs import check_choice

TRAINER_FIELDS = ("gradient_checkpointing", FIELD)  # which mean nothing to a loop of one's own


@dataclass(kw_only=True)
class LowMemPlugin(LowMemArguments):
    """The fields of `LowMemArguments` for a loop on an `Accelerator`.

    ```python
    plugin = LowMemPlugin(optim="adamw", lowmem_state="8bit", lowmem_activations="fp8", learning_rate=1e-5)
    model, optimizer, loader, scheduler = plugin.prepare(
        accelerator, model, loader, scheduler=lambda optimizer: get_cosine_schedule_with_warmup(optimizer, 10, 100)
    )
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step(); scheduler.step(); optimizer.zero_grad()
    ```

    Args:
        learning_rate, weight_decay, optim_args, optim_target_modules, seed: as in TrainingArguments.
        (others): see `LowMemArguments`. `gradient_checkpointing` is the model's own switch here and is refused.

    Raises:
        TypeError, ValueError: at construction, naming the field, its value, the reason and the remedy.
    """

    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    optim_args: str | None = None
    optim_target_modules: str | list[str] | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        if self.gradient_checkpointing is not None:
            raise ValueError(
                f"gradient_checkpointing={self.gradient_checkpointing!r} has no effect in LowMemPlugin. Call "
                "model.gradient_checkpointing_enable() in your loop."
            )
        if self.lowmem_max_skipped_steps is not None:
            raise ValueError(
                f"{FIELD}={self.lowmem_max_skipped_steps!r} has no effect in LowMemPlugin, which does not run your "
                "loop. Leave it unset, and ask optimizer.skipped().in_a_row where you log."
            )
        super().__post_init__()
        self.activations: Report | None = None
        self.stepping: StepInBackward | None = None

    @classmethod
    def from_section(cls, label: str, values: dict[str, Any]) -> "LowMemPlugin":
        """A plugin from fields by name; an unknown one is a ValueError that names `label` and the nearest known."""
        for name in values:
            check_choice(f"{label}: field", name, [f for f in section_fields() if f not in TRAINER_FIELDS])
        return cls(**values)

    @classmethod
    def from_env(cls) -> "LowMemPlugin":
        """What `hf-lowmem launch` hands to its workers, or HF_LOWMEM_CONFIG set by hand; without it all defaults."""
        return cls.from_section(section.VARIABLE, section.from_env())

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> "LowMemPlugin":
        """The section `hf_lowmem_config` of an accelerate YAML."""
        values, _ = section.from_yaml(path)
        return cls.from_section(f"{section.KEY} in {path}", values)

    def _check_step_in_backward(self) -> None:
        """Of what a Trainer checks here, a plugin knows nothing before it sees the Accelerator: see `prepare`."""

    def make_optimizer(self, model: nn.Module, *, flat: bool = False) -> Optimizer:
        """Ours on a model's trainable parameters; see `make_optimizer` for which of them decay.

        Args:
            flat: for DeepSpeed, which makes one vector of each parameter group; `prepare` sets it.

        Raises:
            ValueError: where `optim` is not one of ours.
        """
        if self.optim not in OPTIMIZERS:
            raise ValueError(
                f"optim={self.optim!r} is not one of hf_lowmem's ({', '.join(OPTIMIZERS)}). Build it yourself and pass "
                "it: plugin.prepare(accelerator, model, ..., optimizer=yours)."
            )
        return from_spec(self.lowmem_optim_spec(), model, flat=flat)

    def prepare(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        *others: Any,
        scheduler: Callable[[Optimizer], Any] | None = None,
        optimizer: Optimizer | None = None,
    ) -> tuple[Any, ...]:
        """(model, optimizer, *others, scheduler), prepared by the Accelerator; the scheduler only where one is given.

        Args:
            model: not yet prepared. Its layers are converted in place where `lowmem_activations` says so.
            others: what `accelerator.prepare` takes beside them, such as data loaders.
            scheduler: a function from the optimizer, which does not exist before, to its scheduler.
            optimizer: where `optim` is none of ours.

        Raises:
            ValueError: where both or neither of `optim` and `optimizer` say what to use; where the Accelerator's
                engine or settings do not go with the fields.
        """
        ours = self.optim in OPTIMIZERS
        if ours and optimizer is not None:
            raise ValueError(
                f"optim={self.optim!r} and optimizer={type(optimizer).__name__} were both given. Pass one of them."
            )
        if scheduler is not None and not callable(scheduler):
            raise TypeError(
                f"scheduler={scheduler!r}: expected a function from the optimizer to its scheduler, such as "
                "lambda optimizer: get_cosine_schedule_with_warmup(optimizer, 10, 100)."
            )
        self.check(accelerator)
        spec = self.lowmem_activation_spec()
        if spec is not None:
            self.activations = convert(model, spec)
        flat = accelerator.distributed_type is DistributedType.DEEPSPEED
        used = self.make_optimizer(model, flat=flat) if optimizer is None else optimizer
        schedule = [] if scheduler is None else [scheduler(used)]
        prepared = accelerator.prepare(model, used, *others, *schedule)
        if self.lowmem_step_in_backward:
            ready = (lambda: accelerator.sync_gradients) if OPTIMIZERS[self.optim].ACCUMULATES else None
            self.stepping = StepInBackward(used, ready=ready)  # type: ignore[arg-type]
        return prepared

    def check_zero(self, label: str, config: Mapping[str, Any]) -> None:
        """Raise where the fields do not go with DeepSpeed, whose settings `config` are in the form of its JSON."""
        if self.optim in OPTIMIZERS:
            backward, asked = self.lowmem_step_in_backward, f"optim={self.optim!r}"
            zero.check_method(label, self.optim, elementwise(), weights=self.lowmem_weights, step_in_backward=backward)
            zero.check_config(label, config, asked, optimizer=True)
        if self.lowmem_activations is not None:
            zero.check_config(label, config, f"lowmem_activations={self.lowmem_activations!r}", optimizer=False)

    def check(self, accelerator: Accelerator) -> None:
        """Raise where the Accelerator's engine or settings do not go with the fields."""
        engine, fsdp2 = accelerator.distributed_type, bool(getattr(accelerator, "is_fsdp2", False))
        ours = self.optim in OPTIMIZERS
        if ours:
            check_fsdp_spec(self.lowmem_optim_spec(), fsdp2)
        if engine is DistributedType.DEEPSPEED:
            self.check_zero("DeepSpeed", getattr(accelerator.state.deepspeed_plugin, "deepspeed_config", {}))
        if engine is DistributedType.FSDP and not fsdp2 and ours:
            raise ValueError(
                f"optim={self.optim!r} under FSDP1 is not supported: it flattens parameters, so that low-rank and "
                "blockwise state would not survive a checkpoint. Set fsdp_version: 2."
            )
        if self.lowmem_activations is not None and engine is DistributedType.FSDP:
            plugin: Any = accelerator.state.fsdp_plugin
            if getattr(plugin, "activation_checkpointing", False):
                raise ValueError(
                    "fsdp_activation_checkpointing=True cannot be combined with lowmem_activations="
                    f"{self.lowmem_activations!r}: inside it nothing is left for a tier to compress. Set one of them."
                )
        if not self.lowmem_step_in_backward:
            return
        steps = accelerator.gradient_accumulation_steps
        for setting, value, reason, remedy in (
            ("num_processes", accelerator.num_processes if accelerator.num_processes > 1 and not fsdp2 else 0,
             "gradients are averaged after each one's update", "Use FSDP2, or train in one process"),
            ("mixed_precision", accelerator.mixed_precision if accelerator.mixed_precision == "fp16" else None,
             "loss scaling checks every gradient before the first update", "Use bf16"),
        ):  # fmt: skip
            if value:
                raise ValueError(
                    f"{setting}={value!r} cannot be combined with lowmem_step_in_backward=True: {reason}. {remedy}."
                )
        if steps > 1 and not OPTIMIZERS[self.optim].ACCUMULATES:
            raise ValueError(accumulation_refused(f"gradient_accumulation_steps={steps!r}", self.optim))
