"""Memory of a run of transformers' Trainer, counted while it trains, and handed to the Trainer's loggers.

**How numbers get to the loggers.** The Trainer hands one dict of metrics to all callbacks, one after the other, and W&B
and the others are callbacks. So whoever stands before them in the list can add to that dict. The Trainer puts those of
`callbacks=` last, and an event hands over no trainer, so that a callback cannot move itself: `add_to(trainer)` does it,
and the trainers of hf_lowmem do it for every MemoryReportCallback that they are given. The one that they add of
themselves writes the report alone: logs, and so a resumed run's history, are what the plain Trainer's would be. Why not
log a row of our own: `Trainer.log` would take the averages away that TRL collects for the next row, and `on_log` would
cancel the row that is due.

**What is measured.** In a measured step the model has a pair of forward hooks (`hf_lowmem.memory.forward`), and one
forward pass is what they measure. Measuring around the whole `training_step` would count what the loss saves outside of
the model as well, but no event hands over the trainer.
"""

import logging
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lowmem.activations import Report
from hf_lowmem.memory import PeakMemory, gradient_bytes, human_bytes, optimizer_bytes, parameter_bytes
from hf_lowmem.memory.forward import ForwardSaved
from hf_lowmem.memory.peak import CUDA_SOURCE
from hf_lowmem.runs.parts import PARTS
from hf_lowmem.runs.record import RunRecord
from hf_lowmem.runs.report import REPORT, predicted_of
from hf_lowmem.runs.said import adamw_parts, at_end, at_start, is_quiet
from hf_lowmem.runs.skips import KEY, add_skipped, ours_in
from hf_lowmem.runs.timeline import STEP, StepTimeline

__all__ = ["MemoryReportCallback"]

logger = logging.getLogger(__name__)

GIB = 2**30


class MemoryReportCallback(TrainerCallback):
    """Reports what training keeps in memory.

        callback = MemoryReportCallback().add_to(trainer)     # before its loggers
        trainer.train()
        callback.report["optimizer"], callback.report["saved"], callback.report["peak"]

    every:    measure again every so many optimizer steps; None: in the first step only
    verbose:  print a block at the start of training and one at its end (rank 0; the other processes log theirs at its
              end). log_level="error" of the arguments is silent, too
    trim:     first give freed memory back to the system, as PeakMemory does: a few tenths of a second

    `report`, a plain dict, describes the latest `train()`; each figure, in bytes, is this process's, of FSDP its shard:
        weights, trainable    parameters, and those of them that require a gradient
        gradients             `.grad` just before the optimizer's step
        optimizer             all tensors in its state, after its step
        saved                 kept for backward when the model's forward pass ends: of the step's passes, the largest
        saved_by_module       the same by module
        saved_step            the step that was measured, counted from 1
        peak, peak_added      the most in use at once, and that less what was in use at the start
        peak_source           "cuda allocator", or "process RSS, sampled": not to be compared with each other

    What a checkpointed layer recomputes in backward is in `peak`, not in `saved`. The losses of Trainer and of TRL's
    SFT and DPO build on the outputs of this forward pass; the few (B, T) tensors that they save outside of it are left
    out. A loss that takes (B, T, V) logits outside of the model (label smoothing, `compute_loss_func`) saves far more
    there: measure it with `measure_saved`. Forward passes in eval mode or under no_grad (evaluation, a reference model,
    `generate`) do not count. Where a compiled model or DataParallel's replicas run in the model's place, there is no
    `saved`.

    The numbers go to the loggers in GiB, as `lowmem/weights_gib` and so on (W&B and TensorBoard put `train/` before
    it): parts with the first row of metrics after each measured step and with the last, the peak so far with each. The
    key of the peak carries its source, `lowmem/peak_cuda_gib` or `lowmem/peak_rss_gib`. Only loggers that come after
    this callback see them: use `add_to`. `state.log_history`, hence trainer_state.json, has the rows with parts, by the
    same keys. And `output_dir` gets lowmem_report.json, with each save and at the end: settings, memory, loss and
    speed, for `hf-lowmem card` and `hf-lowmem compare`.

    A measured step gives bit-equal results and takes a little longer; the others cost nothing. On a CPU a daemon thread
    reads the process's size 20 times a second. What an exception leaves, that thread and in a measured step two hooks
    on the model, the next training takes away, or `close()`, which hf_lowmem's trainers call.

    Raises TypeError or ValueError for an `every` that is not a positive integer.
    """

    tells = True  # whether numbers go into logs and history, too, and not into the report alone

    def __init__(self, *, every: int | None = None, verbose: bool = True, trim: bool = True) -> None:
        if every is not None and (not isinstance(every, int) or isinstance(every, bool)):
            raise TypeError(f"every={every!r} must be an int, in steps, or None for the first step only")
        if every is not None and every < 1:
            raise ValueError(f"every={every} must be at least 1 step; None measures the first step only")
        self.every = every
        self.verbose = verbose
        self.trim = trim
        self.report: dict[str, Any] = {}
        self.record: RunRecord | None = None  # of rank 0
        self.trainer_name: str | None = None
        self.predicted: dict[str, Any] | None = None  # a plan's `to_dict()`, for the report
        self.head: Callable[[], dict[str, object]] | None = None  # says what was done with the output head's gradient
        self.activations: Report | None = None  # what tiers have done to the model
        self._beside: dict[str, int] = {}  # what AdamW would take
        self._due = False  # measured, and not logged yet
        self._told = 0  # the number of skipped steps that was warned of
        self._last: int | None = None
        self._peak: PeakMemory | None = None
        self._forward = ForwardSaved()
        self.timeline = StepTimeline()  # of the step that was measured last
        weakref.finalize(self, self._forward.detach).atexit = False

    def __getstate__(self) -> dict[str, Any]:
        # A copy reports what was measured, but does not measure on: threads cannot be pickled.
        return self.__dict__ | {"_peak": None, "head": None}

    def add_to(self, trainer: Trainer) -> "MemoryReportCallback":
        """Make it the trainer's first callback, so that its loggers see what this one adds; itself."""
        callbacks = trainer.callback_handler.callbacks
        callbacks[:] = [self, *(callback for callback in callbacks if callback is not self)]
        self.trainer_name = type(trainer).__name__
        return self

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._stop()  # of a training that ended in an exception
        self.report, self._beside, self._last, self._due = {}, {}, None, False
        self.timeline = StepTimeline()
        if state.is_world_process_zero and not state.is_hyper_param_search:
            self.record = self._begin_record(args, state, kw)
        else:
            self.record = None
        self._start_peak(args)
        if self.record is not None and self._tells_of(args):
            self._say_start(args, kw.get("model"), kw.get("optimizer"))

    def close(self) -> None:
        """Take away what a training that ended in an exception has left."""
        self._stop()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        step, model = state.global_step, kw.get("model")
        due = self._last is None or (self.every is not None and step - self._last >= self.every)
        if not due or model is None:
            return
        self._last = step
        if self._peak is None:  # added while training, after on_train_begin
            self._start_peak(args)
        for name in ("saved", "saved_by_module", "saved_step"):
            self.report.pop(name, None)
        self.report |= {"weights": parameter_bytes(model), "trainable": parameter_bytes(model, trainable=True)}
        self._beside = adamw_parts(model, args)
        if not args.torch_compile:  # it would be traced with the hooks, for nothing, and again without them
            self.timeline.begin(model, kw.get("optimizer"), args.device)
            self._forward.attach(model, self.report, self.timeline.after)

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if state.global_step == self._last and not args.torch_compile:
            self.timeline.begin(kw["model"], kw.get("optimizer"), args.device)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        if state.global_step == self._last:
            self.report["gradients"] = gradient_bytes(kw["model"])
            self.timeline.mark(STEP, "")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        # global_step has been counted up since on_step_begin
        if self._last is not None and state.global_step == self._last + 1:
            self._forward.detach()
            self.timeline.mark(STEP, "")
            self.timeline.end()
            if "saved" in self.report:
                self.report["saved_step"] = state.global_step
            self._note_optimizer(kw)
            self._due = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kw: Any
    ) -> None:
        if state.global_step:
            self._note_optimizer(kw)
        if logs is not None and KEY not in logs:  # of a Trainer that is not ours
            self._told = add_skipped(logs, kw.get("optimizer"), self._told)
            if KEY in logs and state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1][KEY] = logs[KEY]
        # What `evaluate()` logs is also what it returns.
        if (
            not self.tells
            or logs is None
            or not self.report
            or any(name.startswith(("eval_", "test_")) for name in logs)
        ):
            return
        last = "train_runtime" in logs
        self._note_peak()
        parts = self._parts() if self._due or last else {}
        numbers = in_gib(parts | self._peaks())
        logs |= numbers
        if parts:
            self._due = False
            self._to_history(state, numbers)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self.write_report(args, state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._stop()
        if not self.report:  # a second end, or one without a beginning: a pruned hyperparameter trial
            return
        self._note_optimizer(kw)
        if self._due and self.tells:  # nothing was logged
            self._due = False
            self._to_history(state, in_gib(self._parts() | self._peaks()))
        self.write_report(args, state, finished=True)
        if self._tells_of(args):
            self._say_end(args, state)

    def write_report(self, args: TrainingArguments, state: TrainerState, *, finished: bool = False) -> None:
        """Write lowmem_report.json into `output_dir`, on rank 0. What cannot be written is a warning, no error."""
        if self.record is None:
            return
        try:
            self.note(state, finished=finished)
            self.record.write(Path(str(args.output_dir)))
        except Exception as error:  # no report is worth a training
            logger.warning("no report of the run in %s: %s: %s", args.output_dir, type(error).__name__, error)

    def note(self, state: TrainerState, *, finished: bool | None = None) -> None:
        """Bring `record` up to date. `finished`: None leaves what it says."""
        if self.record is None:
            return
        self._note_peak()
        memory = {name: value for name, value in self.report.items() if name != "saved_by_module"}
        self.record.update(state, memory, self.timeline.points, finished=finished)
        if self.head is not None:
            self.record.head = self.head()

    def _begin_record(self, args: TrainingArguments, state: TrainerState, event: dict[str, Any]) -> RunRecord | None:
        data = getattr(event.get("train_dataloader"), "dataset", None)
        model, trainer = event.get("model"), self.trainer_name
        try:
            record = RunRecord.begin(args, state, model=model, dataset=data, trainer=trainer, before=self.record)
            if self.predicted is not None:
                record.predicted = predicted_of(self.predicted, "what was predicted")
        except Exception as error:  # models, data and arguments are anybody's, and no report is worth a training
            logger.warning("no report of the run in %s: %s: %s", args.output_dir, type(error).__name__, error)
            return None
        return record

    def _start_peak(self, args: TrainingArguments) -> None:
        self._peak = PeakMemory(args.device, interval=0.05, trim=self.trim)
        self._peak.__enter__()

    def _stop(self) -> None:
        self._forward.detach()
        self.timeline.end()
        if self._peak is not None:
            self._peak.__exit__()
            self._note_peak()
            self._peak = None

    def _note_peak(self) -> None:
        if (peak := self._peak) is not None:
            self.report |= {"peak": peak.peak, "peak_added": peak.added, "peak_source": peak.source}

    def _note_optimizer(self, event: dict[str, Any]) -> None:
        if (optimizer := event.get("optimizer")) is not None:
            self.report["optimizer"] = optimizer_bytes(optimizer)

    def _parts(self) -> dict[str, int]:
        return {name: self.report[name] for name in PARTS if name in self.report}

    def _peaks(self) -> dict[str, int]:
        if "peak" not in self.report:
            return {}
        kind = "cuda" if self.report["peak_source"] == CUDA_SOURCE else "rss"
        return {f"peak_{kind}": self.report["peak"], f"peak_{kind}_added": self.report["peak_added"]}

    def _to_history(self, state: TrainerState, numbers: dict[str, float]) -> None:
        """Add numbers to the row that was just logged."""
        if not state.log_history or state.log_history[-1].get("step") != state.global_step:
            state.log_history.append({"epoch": state.epoch, "step": state.global_step})
        state.log_history[-1] |= numbers

    def _tells_of(self, args: TrainingArguments) -> bool:
        return self.verbose and not is_quiet(args)

    def _say_start(self, args: TrainingArguments, model: nn.Module | None, optimizer: object) -> None:
        if model is None or self.record is None:
            return
        try:
            said = at_start(
                args,
                model,
                ours_in(optimizer),
                trainer=self.trainer_name,
                activations=self.activations,
                predicted=self.record.predicted,
            )
        except Exception as error:  # models and arguments are anybody's, and no words are worth a training
            logger.warning("what is on could not be said: %s: %s", type(error).__name__, error)
            return
        tqdm.write(said)

    def _say_end(self, args: TrainingArguments, state: TrainerState) -> None:
        if not state.is_world_process_zero:
            sizes = {PARTS[name].label: size for name, size in self._parts().items()} | self._peaks()
            logger.info("lowmem: %s", ", ".join(f"{name} {human_bytes(size)}" for name, size in sizes.items()))
            return
        folder = Path(str(args.output_dir))
        results = self.record.results if self.record is not None else {}
        speed = self.record.trainings[-1]["speed"].get("steps_per_second") if self.record is not None else None
        words = [f"{state.global_step:,} steps"]
        words += [f"{speed:.3g} steps/s"] if speed is not None else []
        words += [f"train loss {results['train_loss']:.4g}"] if isinstance(results.get("train_loss"), float) else []
        notes = [f"in {folder / REPORT}, which `hf-lowmem card` and `compare` read"] if self.record is not None else []
        said = at_end(
            self.report,
            self._beside,
            heading=f"hf_lowmem: {', '.join(words)}",
            notes=notes,
            same_activations=self.activations is None
            and not any(getattr(args, f"lowmem_{name}", None) for name in ("activations", "matmul")),
        )
        tqdm.write(said)  # below the progress bar, which is still there


def in_gib(sizes: Mapping[str, int]) -> dict[str, float]:
    """Bytes by part, as they are logged and kept in the history: in GiB, whose bits are those of the bytes."""
    return {f"lowmem/{name}_gib": size / GIB for name, size in sizes.items()}
