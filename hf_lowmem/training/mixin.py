"""One short mixin puts the fields to work in any Trainer."""

import inspect
import logging
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import broadcast_object_list
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from hf_lowmem import checkpoints, rules
from hf_lowmem.activations import OwnedTiers, Report, kept_beside_inputs, owners_of, rehearsal
from hf_lowmem.optim import ALL_METHODS, StepInBackward, from_spec, group_table
from hf_lowmem.optim.base import LowMemOptimizer
from hf_lowmem.runs.callback import MemoryReportCallback
from hf_lowmem.runs.card import mend_metadata
from hf_lowmem.runs.model_card import reporter_of, write_card, write_last_card
from hf_lowmem.runs.skips import StopWhenSkipped, add_skipped
from hf_lowmem.specs import INPUT_TIERS, STORES_AT_REST, ActivationSpec, OptimSpec
from hf_lowmem.training import section
from hf_lowmem.training.arguments import LowMemArguments, inherited_default
from hf_lowmem.training.chosen import CHOSEN, KEY, check_kept
from hf_lowmem.training.multiplying import MultipliesIn8Bits
from hf_lowmem.training.presets import fp32_by, take_weights
from hf_lowmem.training.resting import RestingWeights
from hf_lowmem.training.scheduling import Schedules
from hf_lowmem.training.zeroth import ForwardSteps

if TYPE_CHECKING:
    from hf_lowmem.training.head import BlockedHead  # which needs trl

logger = logging.getLogger(__name__)


class LowMemTrainerMixin(ForwardSteps, MultipliesIn8Bits, RestingWeights, Schedules):
    """Put before a Trainer class: `class LowMemGRPOTrainer(LowMemTrainerMixin, trl.GRPOTrainer): ...`.

    With arguments of the plain class, or with an `optim` of HuggingFace's, the trainer does what its parent does.

    Raises:
        ValueError: where an optimizer is passed beside an `optim` of ours, the model is under FSDP1, or under DeepSpeed
            with what its ZeRO-1 and ZeRO-2 cannot do (see hf_lowmem/rules/deepspeed.py).
    """

    args: Any
    model: Any
    optimizer: Any
    optimizer_cls_and_kwargs: Any
    accelerator: Any
    stepping: StepInBackward | None = None
    _made: bool = False  # whether the optimizer is the one that the fields ask for
    activations: Report | None = None  # what `lowmem_activations` does to the model while it is trained
    _tiers: OwnedTiers | None = None
    reports: bool = True  # whether each training leaves lowmem_report.json and README.md in `output_dir`
    CONFIG: type = LowMemArguments  # the config that the parent needs
    HEAD: "type[BlockedHead] | None" = None  # for trainers whose loss goes through TRL's fused head
    output_head: "BlockedHead | None" = None  # of the training now running or the last one
    predicted: dict[str, Any] | None = None  # a plan of this run, as plain values, for its report
    _run: dict[str, Any] | None = None  # who writes the checkpoints, for their manifests; rank 0 alone knows
    _was_finished = False  # the training went on from the end of a run, and there was nothing to do
    _told: int = 0  # the number of skipped steps that was warned of

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._check_config(next((a for a in (*args, *kwargs.values()) if isinstance(a, LowMemArguments)), None))
        args, kwargs = self._within_budget(args, kwargs)
        super().__init__(*args, **kwargs)
        self._check_rules()
        self._rehearse_products()
        self._rehearse_tiers()
        self._rehearse_rest(self._resting_spec())
        self._check_schedule()
        self._check_budget()
        if isinstance(self.args, LowMemArguments) and self.args.lowmem_max_skipped_steps is not None:
            self.add_callback(StopWhenSkipped(self.args.lowmem_max_skipped_steps))  # type: ignore[attr-defined]
        section.state.taken |= isinstance(self.args, LowMemArguments)

    def _check_budget(self) -> None:
        run = rules.Run.from_fields(self.args)
        if run.budget is not None and self.predicted is None:
            raise ValueError(
                f"{run.say('budget')} has no effect: {type(self).__name__} has made its arguments itself, after "
                "the search would have run. Pass args=, or leave it unset."
            )

    def _check_config(self, args: LowMemArguments | None) -> None:
        """Raise for a config of which this trainer would leave fields unread."""
        if args is None:
            return
        reader = args.READER
        if reader is not None and reader not in [c.__name__ for c in type(self).__mro__]:
            raise TypeError(
                f"{type(self).__name__} was handed a {type(args).__name__}, whose losses and reference fields only "
                f"{reader} reads. Use {reader}, or the config of this trainer: with_lowmem(...)."
            )
        if not isinstance(args, self.CONFIG) and not section.state.launched:  # TRL makes its own, and that has them
            raise TypeError(
                f"{type(self).__name__} was handed a {type(args).__name__}, and needs a {self.CONFIG.__name__} with "
                f"our fields. Make the arguments with LowMem{self.CONFIG.__name__}."
            )

    def _within_budget(self, args: Any, kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The constructor's arguments with what `lowmem_budget` or lowmem="auto" asks for: in a copy of the
        TrainingArguments, the settings that were left open are the fastest that fit."""
        asked = next((a for a in (*args, *kwargs.values()) if isinstance(a, LowMemArguments)), None)
        if asked is None or rules.Run.from_fields(asked).budget is None or self.predicted is not None:
            return args, kwargs
        given = inspect.signature(super().__init__).bind_partial(*args, **kwargs).arguments
        # The planner runs this very trainer, and so stands above it.
        from hf_lowmem.planner.search.budget import within_budget

        chosen, self.predicted = within_budget(self, asked, {**given, **given.get("kwargs", {})})
        swap = lambda value: chosen if value is asked else value  # noqa: E731
        return tuple(map(swap, args)), {name: swap(value) for name, value in kwargs.items()}

    @property
    def _ours(self) -> bool:
        return isinstance(self.args, LowMemArguments) and self.args.optim in ALL_METHODS

    def _tier_spec(self) -> ActivationSpec | None:
        return self.args.lowmem_activation_spec() if isinstance(self.args, LowMemArguments) else None

    def _resting_spec(self) -> OptimSpec | None:
        return self.args.lowmem_optim_spec() if self._ours and self.args.lowmem_weights in STORES_AT_REST else None

    def _rehearse_tiers(self) -> None:
        """Say now what training will do to the model, or why it cannot. The model stays as it is."""
        spec = self._tier_spec()
        if spec is not None and self.model is not None:
            with rehearsal(self.model, spec) as self.activations:
                self._compare_with_checkpointing(self.activations)
            logger.info("lowmem_activations=%r:\n%s", spec.tiers, self.activations)

    def _compare_with_checkpointing(self, report: Report) -> None:
        """Warn where tiers keep more than the checkpointing that they switch off and nobody else has."""
        inherited = inherited_default(type(self.args), "gradient_checkpointing")
        if not inherited or "gradient_checkpointing" not in self.args.lowmem_open:
            return
        if all(layer.tier in INPUT_TIERS for layer in report.layers) or not logger.isEnabledFor(logging.WARNING):
            return
        try:
            kept, inputs = kept_beside_inputs(self.model, report, self.accelerator.autocast)
            numbers = f"{kept:,.0f} bytes a token in all layers, where checkpointing keeps {inputs:,.0f}"
        except Exception as error:  # a model that does not run on token ids alone
            kept, inputs, numbers = 1.0, 0.0, f"more than each layer's input (not counted: {type(error).__name__})"
        if kept > inputs:
            logger.warning(
                "lowmem_activations=%r takes the place of the activation checkpointing that %s has by default. It is "
                "faster and keeps more: %s. To keep less than checkpointing, set lowmem_activations='checkpoint_fp8'. "
                "gradient_checkpointing=False says that it was off anyway.",
                report.tiers,
                type(self.args).__name__,
                numbers,
            )

    def _put_on(self) -> None:
        """Put on the model what stays there for this training. Again is nothing, on the same model."""
        self._put_products()
        spec = self._tier_spec()
        if spec is not None and (self._tiers is None or self._tiers.model is not self.model):
            self._take_tiers()  # of a model that a search has replaced
            self._tiers = OwnedTiers(self.model, spec, f"lowmem_activations={spec.tiers!r} of {type(self).__name__}")
            self.activations = self._tiers.report

    def _take_off(self) -> None:
        """Leave the model as it was before this training, whatever has ended it."""
        if self.stepping is not None:
            self.stepping.remove()
            self.stepping.forget()  # a step that an exception has cut off
        self._take_products()
        self._take_tiers()

    def _take_tiers(self) -> None:
        if self._tiers is not None:
            self._tiers.take_off()
            self._tiers = None

    def _check_rules(self) -> None:
        """Check the rules again: the launcher's set-up shows here first, and fields may have been assigned since."""
        if isinstance(self.args, LowMemArguments):
            others = {"optimizers": self.optimizer, "optimizer_cls_and_kwargs": self.optimizer_cls_and_kwargs}
            passed = None if self._made else next((f"{n}=" for n, value in others.items() if value is not None), None)
            run = rules.Run.from_arguments(self.args).with_accelerator(self.accelerator).with_model(self.model)
            rules.check(run.knowing(passed=passed))
            self._check_forwards()

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One training step; step in backward first finds the sharded parameters that FSDP2 has put in."""
        if self.stepping is not None:
            self.stepping.follow()
        if self._tiers is not None:
            self._tiers.at_step(self.state.global_step)  # type: ignore[attr-defined]
        return self._step_of(partial(super().training_step, *args, **kwargs))  # type: ignore[misc]

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Ours, where `optim` names it: with the decay split of the parent and the user's lr, betas, eps and decay."""
        self._check_rules()
        self._put_on()  # `model_init` has made a new model for this training
        if self.optimizer is not None or not self._ours:
            return super().create_optimizer(model) if model is not None else super().create_optimizer()  # type: ignore[misc]
        opt_model = self.model if model is None else model
        decay = self.get_decay_parameter_names(opt_model)  # type: ignore[attr-defined]
        flat = getattr(self, "is_deepspeed_enabled", False)
        take_weights(self.args, opt_model, fp32=fp32_by(self.accelerator))
        spec = self.args.lowmem_optim_spec()
        self._put_to_rest(spec, opt_model)
        optimizer = from_spec(spec, opt_model, decay=set(decay), flat=flat, later=self._later(opt_model))
        log_groups(optimizer)
        if self.stepping is not None:  # of a model that `auto_find_batch_size` or a search has replaced
            self.stepping.remove()
            self.stepping = None
        if self.args.lowmem_step_in_backward:
            sums = self.args.lowmem_accumulation
            ready = self._window_ends if optimizer.ACCUMULATES or sums is not None else None
            self.stepping = StepInBackward(optimizer, ready=ready, accumulation=sums)
        self.optimizer, self._made = optimizer, True
        return optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the parent does, from a checkpoint that is known to be whole.

        What the fields put on the model (tiers, hooks of step in backward) is there while this runs, and gone when it
        ends, also by an exception; `evaluate` and `predict` have no need of it.

        Args:
            resume_from_checkpoint: a folder; True for the newest complete checkpoint of `output_dir`; "auto" for that
                one, or a fresh start where there is none. Incomplete and damaged ones, those without an optimizer's
                state and those of an older run are passed over, and named. From the last checkpoint of a finished run
                nothing is trained: it ends as that run did.

        Raises:
            BadCheckpoint: (a ValueError) where the folder named is incomplete, damaged, a model alone, or holds what
                only code could rebuild; it names the file, and the last complete checkpoint.
        """
        resume = self._checked(resume_from_checkpoint)
        if self.accelerator.is_main_process:
            self._run = checkpoints.begin_run(self.args.output_dir, str(resume) if resume else None)
        self._was_finished = False
        reporter = reporter_of(self)
        try:
            if self.HEAD is not None and isinstance(self.args, LowMemArguments):
                self.output_head = self.output_head or self.HEAD(self)
                self.output_head.put(compiled=getattr(self.args, "torch_compile", False))
            if getattr(self, "model_init", None) is None:
                self._put_on()
            for owner in owners_of(self.model) if self._tiers is None else ():
                logger.warning("this training keeps the tiers that the model has from %s", owner)
            if reporter is not None:
                reporter.head = None if self.output_head is None else self.output_head.facts
                reporter.activations = self.activations or reporter.activations
            result = super().train(resume, *args, **kwargs)  # type: ignore[misc]
        finally:
            self._take_off()
            if self.output_head is not None:
                self.output_head.take_off()
            for callback in self.callback_handler.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, MemoryReportCallback):
                    callback.close()
        if self._was_finished:
            result = result._replace(training_loss=result.metrics["train_loss"])
        write_last_card(self, super().create_model_card)  # type: ignore[misc]
        return result

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Leave no epoch for a checkpoint at the last step, where the parent trains on; forget the step that an
        attempt with another batch size has not ended."""
        if self.stepping is not None:
            self.stepping.forget()
        self._forget_window()
        begin = super()._init_training_state(  # type: ignore[misc]
            max_steps, num_update_steps_per_epoch, num_train_epochs, *args, **kwargs
        )
        step = self.state.global_step  # type: ignore[attr-defined]
        if step == 0 or step < max_steps:
            return begin
        self._was_finished = True
        logger.warning(
            "the run was finished: its checkpoint is at step %d of %d, so nothing is trained. To train on, raise "
            "max_steps or num_train_epochs; to begin a new run, leave resume_from_checkpoint unset and choose another "
            "output_dir.",
            step,
            max_steps,
        )
        return num_train_epochs, 0

    def _checked(self, resume: str | bool | None) -> str | bool | None:
        if not resume:
            return resume
        found: list[Any] = [None, None]
        if self.accelerator.is_main_process:  # the others would read every file again
            try:
                found[0] = checkpoints.choose(self.args.output_dir, resume)
            except (ValueError, OSError) as error:
                found[1] = error
        found = broadcast_object_list(found)
        if found[1] is not None:
            raise found[1]
        if found[0]:
            check_kept(self.args, found[0])
        return found[0]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save as the parent does; then, when every process has written, a manifest that says that it is complete.

        Older checkpoints are deleted after that, not before.
        """
        step = self.state.global_step  # type: ignore[attr-defined]
        run = Path(self._get_output_dir(trial=trial))  # type: ignore[attr-defined]
        folder, limit = run / f"checkpoint-{step}", self.args.save_total_limit
        if self.args.should_save:
            checkpoints.set_aside(folder)
        self.accelerator.wait_for_everyone()
        self.args.save_total_limit = None
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            facts = {"step": step, "processes": self.args.world_size, "versions": library_versions()}
            if self._run is not None:
                facts["run"] = self._run
            if CHOSEN in vars(self.args):
                facts[KEY] = vars(self.args)[CHOSEN]
            checkpoints.write_manifest(folder, **facts)
            checkpoints.drop_aside(folder)
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,  # type: ignore[attr-defined]
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as the parent does; PEFT's card then names no folder of this machine as its base model."""
        cast("Trainer", super()).save_model(output_dir, _internal_call)
        if self.args.should_save and isinstance(self.args, LowMemArguments):
            mend_metadata(Path(output_dir or str(cast("Trainer", self).args.output_dir)))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the parent's card with what the training takes; a README.md that no trainer has made stays as it is."""
        write_card(self, super().create_model_card, *args, **kwargs)  # type: ignore[misc]

    def _window_ends(self) -> bool:
        """Whether the backward pass now running is the last of its gradient accumulation."""
        return self.accelerator.sync_gradients

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the parent does, with the true `grad_norm` where gradients were freed before it could look, and with
        the number of steps that have left out updates, if there are any."""
        self._told = add_skipped(logs, self.optimizer, self._told)
        if self.stepping is not None and "grad_norm" in logs:
            norm = self.stepping.grad_norm()
            logs["grad_norm"] = float("nan") if norm is None else norm
        self._log_slope(logs)
        if self._was_finished and "train_loss" in logs:  # of no step at all
            logs["train_loss"] = mean_loss(self.state.log_history)  # type: ignore[attr-defined]
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


def mean_loss(rows: list[dict[str, Any]]) -> float:
    """The mean over the steps of a run, from the means that it logged; NaN where it logged none."""
    total, last = 0.0, 0
    for row in rows:
        if "loss" in row:
            total, last = total + row["loss"] * (row["step"] - last), row["step"]
    return total / last if last else float("nan")


def library_versions() -> dict[str, str]:
    """Versions of the libraries that write a checkpoint's files."""
    return {name: version(name) for name in ("torch", "transformers", "accelerate")}


def log_groups(optimizer: LowMemOptimizer) -> None:
    """One line a parameter group: its rule, its size, and the bytes its state will take."""
    rows = group_table(optimizer)
    for row in rows:
        logger.info(
            "%s: %d tensors, %s parameters, rank %s, weight decay %g, state %s: %.1f MiB",
            row["rule"],
            row["tensors"],
            f"{row['parameters']:,}",
            row["rank"],
            row["weight_decay"],
            row["state"],
            row["state_bytes"] / 2**20,
        )
    total, count = sum(r["state_bytes"] for r in rows), sum(r["parameters"] for r in rows)
    logger.info("optimizer state: %.1f MiB, %.3f bytes a parameter", total / 2**20, total / max(count, 1))


class LowMemTrainer(LowMemTrainerMixin, Trainer):
    """`transformers.Trainer` for `LowMemTrainingArguments`."""
