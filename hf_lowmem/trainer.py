"""One short mixin puts the fields to work in any Trainer."""

import inspect
import logging
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from hf_lowmem import checkpoints, zero
from hf_lowmem.activations import Report, convert
from hf_lowmem.arguments import LowMemArguments
from hf_lowmem.compatibility import FSDP1_REFUSED, check_fsdp_spec
from hf_lowmem.model_card import reporter_of, write_card, write_last_card
from hf_lowmem.optim import OPTIMIZERS, StepInBackward, elementwise, from_spec, group_table
from hf_lowmem.optim.base import LowMemOptimizer
from hf_lowmem.skips import StopWhenSkipped, add_skipped

logger = logging.getLogger(__name__)


class LowMemTrainerMixin:
    """Put before a Trainer class: `class LowMemGRPOTrainer(LowMemTrainerMixin, trl.GRPOTrainer): ...`.

    With arguments of the plain class, or with an `optim` of HuggingFace's, the trainer does what its parent does.

    Raises:
        ValueError: where an optimizer is passed beside an `optim` of ours, the model is under FSDP1, or under DeepSpeed
            with what its ZeRO-1 and ZeRO-2 cannot do (see hf_lowmem/zero.py).
    """

    args: Any
    model: Any
    optimizer: Any
    optimizer_cls_and_kwargs: Any
    accelerator: Any
    stepping: StepInBackward | None = None
    activations: Report | None = None  # what `lowmem_activations` did to the model
    reports: bool = True  # whether each training leaves lowmem_report.json and README.md in `output_dir`
    foretold: dict[str, Any] | None = None  # a plan of this run, as plain values, for its report
    _told: int = 0  # the number of skipped steps that was warned of

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        args, kwargs = self._within_budget(args, kwargs)
        super().__init__(*args, **kwargs)
        passed = self.optimizer is not None or self.optimizer_cls_and_kwargs is not None
        if self._ours and passed:
            raise ValueError(
                f"optim={self.args.optim!r} would have no effect: an optimizer was passed as well. Pass one or the "
                "other: drop `optimizers=`/`optimizer_cls_and_kwargs=`, or leave `optim` and the lowmem fields unset."
            )
        if isinstance(self.args, LowMemArguments) and self.args.lowmem_max_skipped_steps is not None:
            self.add_callback(StopWhenSkipped(self.args.lowmem_max_skipped_steps))  # type: ignore[attr-defined]
        self._convert_activations()

    def _within_budget(self, args: Any, kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The constructor's arguments with what `lowmem_budget` asks for: in a copy of the TrainingArguments, the
        settings that were left open are the fastest that fit."""
        asked = next((a for a in (*args, *kwargs.values()) if isinstance(a, LowMemArguments)), None)
        if asked is None or asked.lowmem_budget is None or self.foretold is not None:
            return args, kwargs
        given = inspect.signature(super().__init__).bind_partial(*args, **kwargs).arguments
        # The planner runs this very trainer, and so stands above it.
        within = import_module("hf_lowmem.planner.within")
        chosen, self.foretold = within.within_budget(self, asked, {**given, **given.get("kwargs", {})})
        swap = lambda value: chosen if value is asked else value  # noqa: E731
        return tuple(map(swap, args)), {name: swap(value) for name, value in kwargs.items()}

    @property
    def _ours(self) -> bool:
        return isinstance(self.args, LowMemArguments) and self.args.optim in OPTIMIZERS

    def _convert_activations(self) -> None:
        spec = self.args.lowmem_activation_spec() if isinstance(self.args, LowMemArguments) else None
        if spec is not None and self.model is not None:
            self._check_engine(f"lowmem_activations={spec.tiers!r}")
            report = convert(self.model, spec)
            if self.activations is None:
                logger.info("lowmem_activations=%r:\n%s", spec.tiers, report)
            self.activations = report

    def _check_engine(self, setting: str, *, optimizer: bool = False) -> None:
        """What accelerate's launcher has set up shows here first."""
        if getattr(self, "is_deepspeed_enabled", False):
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            if optimizer:
                args = self.args
                zero.check_method(
                    "DeepSpeed",
                    args.optim,
                    elementwise(),
                    weights=args.lowmem_weights,
                    step_in_backward=args.lowmem_step_in_backward,
                )
            zero.check_config("DeepSpeed", config, setting, optimizer=optimizer)
        if getattr(self, "is_fsdp_enabled", False) and self.accelerator.state.fsdp_plugin.fsdp_version != 2:
            raise ValueError(f"{setting} under FSDP1: {FSDP1_REFUSED}")

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the parent; step in backward first finds the sharded parameters that FSDP2 has put in."""
        if self.stepping is not None:
            self.stepping.follow()
        return super().training_step(*args, **kwargs)  # type: ignore[misc]

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Ours, where `optim` names it: with the decay split of the parent and the user's lr, betas, eps and decay."""
        self._convert_activations()  # again: `model_init` makes a new model for each training
        if self.optimizer is not None or not self._ours:
            return super().create_optimizer(model) if model is not None else super().create_optimizer()  # type: ignore[misc]
        self._check_engine(f"optim={self.args.optim!r}", optimizer=True)
        check_fsdp_spec(self.args.lowmem_optim_spec(), getattr(self, "is_fsdp_enabled", False))
        opt_model = self.model if model is None else model
        decay = self.get_decay_parameter_names(opt_model)  # type: ignore[attr-defined]
        flat = getattr(self, "is_deepspeed_enabled", False)
        optimizer = from_spec(self.args.lowmem_optim_spec(), opt_model, decay=set(decay), flat=flat)
        log_groups(optimizer)
        if self.stepping is not None:  # of a model that `auto_find_batch_size` or a search has replaced
            self.stepping.remove()
            self.stepping = None
        if self.args.lowmem_step_in_backward:
            self.stepping = StepInBackward(optimizer, ready=self._window_ends if optimizer.ACCUMULATES else None)
        self.optimizer = optimizer
        return optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the parent, from a checkpoint that is known to be whole.

        Args:
            resume_from_checkpoint: a folder; True for the newest complete checkpoint of `output_dir`; "auto" for that
                one, or a fresh start where there is none. Incomplete and damaged ones are passed over, and named.

        Raises:
            BadCheckpoint: (a ValueError) where the folder named is incomplete, damaged, or holds what only code could
                rebuild; it names the file, and the last complete checkpoint.
        """
        resume = self._checked(resume_from_checkpoint)
        reporter_of(self)
        result = super().train(resume, *args, **kwargs)  # type: ignore[misc]
        write_last_card(self, super().create_model_card)  # type: ignore[misc]
        return result

    def _checked(self, resume: str | bool | None) -> str | bool | None:
        if not resume:
            return resume
        found: list[Any] = [None, None]
        if self.accelerator.is_main_process:  # the others would read every file again
            try:
                found[0] = self._choose_checkpoint(resume)
            except (ValueError, OSError) as error:
                found[1] = error
        found = broadcast_object_list(found)
        if found[1] is not None:
            raise found[1]
        return found[0]

    def _choose_checkpoint(self, resume: str | bool) -> str | None:
        run = self.args.output_dir
        if resume is not True and resume != "auto":
            try:
                checkpoints.verify(str(resume))
            except checkpoints.BadCheckpoint as error:
                last, _ = checkpoints.last_complete(Path(str(resume)).resolve().parent)
                offer = f"The last complete checkpoint is {last}." if last else "The run has no complete checkpoint."
                raise checkpoints.BadCheckpoint(f"{error} {offer}") from error
            return str(resume)
        last, passed = checkpoints.last_complete(run)
        for reason in passed:
            logger.warning("passed over: %s", reason)
        if last is None and resume is True:
            reasons = "".join(f"\n- {reason}" for reason in passed)
            raise ValueError(f"resume_from_checkpoint=True: there is no complete checkpoint in {run}.{reasons}")
        if last is not None:
            logger.info("resuming from %s", last)
        return None if last is None else str(last)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As the parent; then, when every process has written, a manifest that says that it is complete.

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
            checkpoints.write_manifest(folder, step=step, processes=self.args.world_size, versions=library_versions())
            checkpoints.drop_aside(folder)
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,  # type: ignore[attr-defined]
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As the parent, with what the training takes; a README.md that no trainer has made stays as it is."""
        write_card(self, super().create_model_card, *args, **kwargs)  # type: ignore[misc]

    def _window_ends(self) -> bool:
        """Whether the backward pass now running is the last of its gradient accumulation."""
        return self.accelerator.sync_gradients

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the parent, with the true `grad_norm` where gradients were freed before it could look, and with the number
        of steps that have left out updates, if there are any."""
        self._told = add_skipped(logs, self.optimizer, self._told)
        if self.stepping is not None and "grad_norm" in logs:
            norm = self.stepping.grad_norm()
            logs["grad_norm"] = float("nan") if norm is None else norm
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


def library_versions() -> dict[str, str]:
    """Of what a checkpoint's files are made by."""
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
