"""LowMemPlugin: the fields for a training loop of one's own on accelerate.

accelerate has no door for a third party's optimizer or for changes to a model before it is wrapped, so the plugin
stands beside the Accelerator and does, in the right order, what a Trainer's mixin does elsewhere: convert the model's
layers, build the optimizer on its named parameters, then let the Accelerator prepare everything in one call, as FSDP2
needs.

Its fields are those of `LowMemArguments`, so a run moves between a Trainer and a loop without renaming anything, and
one section of an accelerate YAML serves both.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar
from weakref import WeakSet, WeakValueDictionary

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from hf_lowmem import rules
from hf_lowmem.activations import OwnedTiers, Report
from hf_lowmem.distributed import is_sharded
from hf_lowmem.matmul import OwnedProducts, ProductReport
from hf_lowmem.optim import ALL_METHODS, LowMemOptimizer, StepInBackward, from_spec
from hf_lowmem.optim.resting import rest
from hf_lowmem.reasons import CLIPPING, NO_CLIPPING
from hf_lowmem.runs.skips import FIELD
from hf_lowmem.specs import STORES_AT_REST, check_choice
from hf_lowmem.training import section
from hf_lowmem.training.arguments import SECTION_FIELDS, LowMemArguments, section_fields
from hf_lowmem.training.four_bits import keep_backward
from hf_lowmem.training.multiplying import put_products
from hf_lowmem.training.own_defaults import ADAM_DEFAULTS
from hf_lowmem.training.presets import fp32_by, take_weights
from hf_lowmem.training.resting import LoadState, keep_scales
from hf_lowmem.weights import resting

TRAINER_FIELDS = ("gradient_checkpointing", FIELD)  # which mean nothing to a loop of one's own

# Plugins that ask for something and were not prepared. They are watched, not kept.
_waiting: "WeakValueDictionary[int, LowMemPlugin]" = WeakValueDictionary()
_prepared: "WeakSet[Accelerator]" = WeakSet()  # by a plugin
_plain_backward = Accelerator.backward


@wraps(_plain_backward)
def _backward(self: Accelerator, loss: Any, **kwargs: Any) -> None:
    """`Accelerator.backward`, which no plugin may see unprepared: nothing of its fields would be applied.

    A plugin that waits for another Accelerator, for a later stage, is left alone.
    """
    for plugin in [] if self in _prepared else list(_waiting.values()):
        raise ValueError(
            f"LowMemPlugin with {rules.Run.from_fields(plugin).asked} was made and not prepared, so that none of its "
            "fields is applied. Write plugin.prepare(accelerator, model, ...) for accelerator.prepare(model, ...)."
        )
    _plain_backward(self, loss, **kwargs)


Accelerator.backward = _backward


def _no_clipping(*args: Any, **kwargs: Any) -> None:
    raise ValueError(
        f"clipping gradients cannot be combined with lowmem_step_in_backward=True: {CLIPPING}, and none is left. Do "
        f"not clip; {NO_CLIPPING}."
    )


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
    plugin.remove()
    ```

    Args:
        learning_rate, weight_decay, optim_args, optim_target_modules, seed: as in TrainingArguments.
        (others): see `LowMemArguments`. `gradient_checkpointing` is the model's own switch here and is refused.

    Raises:
        TypeError, ValueError: at construction, naming the field, its value, the reason and the remedy.
    """

    PROGRAM: ClassVar[str] = "LowMemPlugin"  # whose loop it is, as errors call it

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
        self.products: ProductReport | None = None
        self.stepping: StepInBackward | None = None
        self._put_on: list[OwnedTiers | OwnedProducts | StepInBackward] = []
        self._state_hooks: list[RemovableHandle | LoadState] = []
        self._fp32 = False  # whether an engine updates fp32 weights, as far as `prepare` knows
        self._undo_clipping: Callable[[], Any] = lambda: None
        if rules.Run.from_fields(self).asked is not None:
            _waiting[id(self)] = self

    @classmethod
    def from_section(cls, label: str, values: dict[str, Any]) -> "LowMemPlugin":
        """A plugin from fields by name; an unknown one is a ValueError that names `label` and the nearest known."""
        for name in values:
            check_choice(f"{label}: field", name, [f for f in section_fields() if f not in TRAINER_FIELDS])
        return cls(**values)

    @classmethod
    def from_env(cls) -> "LowMemPlugin":
        """The plugin that `hf-lowmem launch` hands to workers, or HF_LOWMEM_CONFIG set by hand; else all defaults."""
        return cls.from_section(section.VARIABLE, section.from_env())

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> "LowMemPlugin":
        """The section `hf_lowmem_config` of an accelerate YAML."""
        values, _ = section.from_yaml(path)
        return cls.from_section(f"{section.KEY} in {path}", values)

    def make_optimizer(self, model: nn.Module, *, flat: bool = False, later: bool = False) -> LowMemOptimizer:
        """Ours on a model's trainable parameters; see `make_optimizer` for which of them decay.

        Args:
            flat: for DeepSpeed, which makes one vector of each parameter group; `prepare` sets it.
            later: for FSDP2, after which `prepare` puts weights to rest; it sets this, too.

        Raises:
            ValueError: where `optim` is not one of ours.
        """
        if self.optim not in ALL_METHODS:
            raise ValueError(
                f"optim={self.optim!r} is not one of hf_lowmem's ({', '.join(ALL_METHODS)}). Build it yourself and "
                "pass it: plugin.prepare(accelerator, model, ..., optimizer=yours)."
            )
        self._taken()
        take_weights(self, model, fp32=flat or self._fp32)
        return from_spec(self.lowmem_optim_spec(), model, flat=flat, later=later)

    def _taken(self) -> None:
        """Note that somebody applies these fields from here on."""
        _waiting.pop(id(self), None)
        section.state.taken = True

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
            model: not yet prepared. Its layers are converted in place where `lowmem_activations` or `lowmem_matmul`
                say so, until `remove()`.
            others: what `accelerator.prepare` takes beside them, such as data loaders.
            scheduler: a function from the optimizer, which does not exist before, to its scheduler.
            optimizer: where `optim` is none of ours.

        Raises:
            ValueError: where both or neither of `optim` and `optimizer` say what to use; where the Accelerator's
                engine or settings do not go with the fields.
        """
        if scheduler is not None and not callable(scheduler):
            raise TypeError(
                f"scheduler={scheduler!r}: expected a function from the optimizer to its scheduler, such as "
                "lambda optimizer: get_cosine_schedule_with_warmup(optimizer, 10, 100)."
            )
        if (handed := next((other for other in others if isinstance(other, Optimizer)), None)) is not None:
            raise TypeError(
                f"{type(handed).__name__} beside the model: accelerator.prepare takes one there, and this makes "
                "its own from optim. Leave it out: plugin.prepare(accelerator, model, loader); or hand over yours as "
                "optimizer=, with optim left unset."
            )
        self.check(accelerator, model, passed=None if optimizer is None else f"optimizer={type(optimizer).__name__}")
        keep_backward(model)
        products = put_products(self, model, accelerator)
        if products is not None:
            self._put_on.append(products)
            self.products = products.report
        spec = self.lowmem_activation_spec()
        if spec is not None:
            tiers = OwnedTiers(model, spec, f"lowmem_activations={spec.tiers!r} of LowMemPlugin")
            self._put_on.append(tiers)
            self.activations = tiers.report
        flat, self._fp32 = accelerator.distributed_type is DistributedType.DEEPSPEED, fp32_by(accelerator)
        later = accelerator.distributed_type is DistributedType.FSDP and not any(map(is_sharded, model.parameters()))
        used = self.make_optimizer(model, flat=flat, later=later) if optimizer is None else optimizer
        schedule = [] if scheduler is None else [scheduler(used)]
        prepared = accelerator.prepare(model, used, *others, *schedule)
        if later and isinstance(used, LowMemOptimizer) and self.lowmem_weights in STORES_AT_REST:
            rest(self.lowmem_optim_spec(), model, optimizer=used)
        if resting(model):  # `save_state` writes plain bf16 values, and `load_state` wants their scales
            self._state_hooks += keep_scales(accelerator, model)
        if self.lowmem_step_in_backward:
            sums = self.lowmem_accumulation
            adds = ALL_METHODS[self.optim].ACCUMULATES or sums is not None
            ready = (lambda: accelerator.sync_gradients) if adds else None
            self.stepping = StepInBackward(used, ready=ready, accumulation=sums)  # type: ignore[arg-type]
            self._put_on.append(self.stepping)
            accelerator.clip_grad_norm_ = accelerator.clip_grad_value_ = _no_clipping
            self._undo_clipping = lambda: [vars(accelerator).pop(f"clip_grad_{n}_", None) for n in ("norm", "value")]
        self._taken()
        _prepared.add(accelerator)
        return prepared

    def remove(self) -> None:
        """Take off what `prepare` has put on models and Accelerator: tiers, products, hooks, no clipping.

        To be called when the training is over, before another one uses the model or its memory.
        """
        for part in self._put_on:
            part.remove() if isinstance(part, StepInBackward) else part.take_off()
        self._put_on.clear()
        for hook in self._state_hooks:
            hook.remove()
        self._state_hooks.clear()
        self._undo_clipping()

    def check(self, accelerator: Accelerator, model: nn.Module | None = None, *, passed: str | None = None) -> None:
        """Raise where the Accelerator's engine or settings do not go with the fields.

        Args:
            accelerator: as it is before it prepares anything.
            model: to be trained.
            passed: an optimizer that was passed beside the fields, as it was written.
        """
        run = self._facts(rules.Run.from_arguments(self)).with_accelerator(accelerator)
        steps = accelerator.gradient_accumulation_steps
        run = run.knowing({"accumulation": f"gradient_accumulation_steps={steps!r}"}, accumulation=steps, passed=passed)
        rules.check(run.with_model(model))

    def _facts(self, run: rules.Run) -> rules.Run:
        # With an optimizer of somebody else's these are read by nobody.
        given = [name for name in (*SECTION_FIELDS, *ADAM_DEFAULTS) if name not in self.lowmem_open]
        unread = {} if run.ours else {name: getattr(self, name) for name in given}
        return run.knowing(loop=self.PROGRAM, fields={**(run.fields or {}), **unread})
