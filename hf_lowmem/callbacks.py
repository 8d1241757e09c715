"""LowMemCallback: what a run of transformers' Trainer keeps in memory, counted while it trains.

It works with the Trainer as it is, beside `optimizers=(make_optimizer(...), None)` or any other optimizer.

Saved tensors are counted by hooks on autograd's stack, which must come down whatever happens. The Trainer's events
cannot see to that: after an exception (out of memory, most of all) none follows. A forward hook on the model can, since
with `always_call=True` torch runs it when the forward pass raises too. So in a measured step the model has a pair of
forward hooks, and one forward pass is what they measure. Measuring around the whole `training_step` would count what
the loss saves outside of the model as well, but no event hands over the trainer.
"""

import logging
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lowmem.activations import Report, convert
from hf_lowmem.memory import (
    PeakMemory,
    SavedReport,
    gradient_bytes,
    human_bytes,
    measure_saved,
    optimizer_bytes,
    parameter_bytes,
)
from hf_lowmem.memory.peak import CUDA_SOURCE
from hf_lowmem.specs import ActivationSpec

__all__ = ["LowMemCallback"]

logger = logging.getLogger(__name__)

ROWS = {
    "weights": "weights",
    "trainable": "  of which trained",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "saved": "saved for backward",
}


class LowMemCallback(TrainerCallback):
    """Reports what training keeps in memory, in bytes.

        callback = LowMemCallback()
        trainer = Trainer(model, args, train_dataset=data, callbacks=[callback], optimizers=(optimizer, None))
        trainer.train()
        callback.report["optimizer"], callback.report["saved"], callback.report["peak"]

    activations: also let the model keep less for backward: a tier, or tiers by layer, as for `activations.convert`,
              whose report is `callback.activations`. None: leave the model alone
    every:    measure again every so many optimizer steps; None: in the first step only
    verbose:  print a table at the end of training (rank 0; the other processes log theirs)

    `report`, a plain dict, describes the latest `train()`; each figure is this process's, of FSDP its shard:
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

    The numbers go to `state.log_history` too, as `lowmem/...`: after each measured step and at the end of training,
    hence to trainer_state.json. The peak's key there carries its source.

    A measured step gives bit-equal results and takes a little longer; the others cost nothing. On a CPU a daemon thread
    reads the process's size 20 times a second. After an exception, the thread and, in a measured step, the model's two
    hooks stay until the next training begins; so does the counting if a KeyboardInterrupt ended the forward pass.

    Raises TypeError or ValueError for an `every` that is not a positive integer.
    """

    def __init__(
        self, activations: str | ActivationSpec | None = None, *, every: int | None = None, verbose: bool = True
    ) -> None:
        if every is not None and (not isinstance(every, int) or isinstance(every, bool)):
            raise TypeError(f"every={every!r} must be an int, in steps, or None for the first step only")
        if every is not None and every < 1:
            raise ValueError(f"every={every} must be at least 1 step; None measures the first step only")
        self.spec = ActivationSpec(tiers=activations) if isinstance(activations, str) else activations
        if self.spec is not None and not isinstance(self.spec, ActivationSpec):
            raise TypeError(f"activations={activations!r}: expected a tier, such as 'fp8', or None.")
        self.activations: Report | None = None
        self.every = every
        self.verbose = verbose
        self.report: dict[str, Any] = {}
        self._last: int | None = None
        self._peak: PeakMemory | None = None
        self._model: nn.Module | None = None  # the one that has the hooks
        self._hooks: list[RemovableHandle] = []
        # Its forward calls under way, the outermost first, and which of them is measured.
        self._calls: list[tuple[AbstractContextManager, SavedReport] | None] = []

    def __getstate__(self) -> dict[str, Any]:
        # A copy reports what was measured, but does not measure on: threads and open contexts cannot be pickled.
        return self.__dict__ | {"_peak": None, "_model": None, "_hooks": [], "_calls": []}

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._convert(args, kw.get("model"))

    def _convert(self, args: TrainingArguments, model: nn.Module | None) -> None:
        if self.spec is None or model is None:
            return
        for setting in (
            "gradient_checkpointing",
            "activation_checkpointing",
            "activation_offloading",
            "use_liger_kernel",
        ):
            if getattr(args, setting, None):
                raise ValueError(
                    f"{setting}=True cannot be combined with LowMemCallback(activations={self.spec.tiers!r}): nothing "
                    f"would be left to compress. Set {setting}=False (TRL turns gradient_checkpointing on "
                    "by default); 'checkpoint_fp8' is a tier."
                )
        self.activations = convert(model, self.spec)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._stop()  # of a training that ended in an exception
        self._convert(args, kw.get("model"))  # of `model_init`, or where the callback was added late
        self.report, self._last = {}, None
        self._start_peak(args)

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
        self._attach(model)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        if state.global_step == self._last:
            self.report["gradients"] = gradient_bytes(kw["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        # global_step has been counted up since on_step_begin
        if self._last is not None and state.global_step == self._last + 1:
            self._detach()
            self._note_optimizer(kw)
            self._record(state)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if state.global_step:
            self._note_optimizer(kw)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._stop()
        if not self.report:  # a second end, or one without a beginning: a pruned hyperparameter trial
            return
        self._note_optimizer(kw)
        self._record(state)
        if self.verbose:
            self._show(state.is_world_process_zero)

    def _attach(self, model: nn.Module) -> None:
        self._detach()
        # Around all other hooks, and of two callbacks the first to open is the last to close.
        before = model.register_forward_pre_hook(self._before_forward, prepend=True)
        after = model.register_forward_hook(self._after_forward, always_call=True)
        self._model, self._hooks = model, [before, after]

    def _detach(self) -> None:
        for handle in self._hooks:
            handle.remove()
        for call in reversed(self._calls):  # left by a KeyboardInterrupt, which `always_call` does not catch
            if call is not None:
                call[0].__exit__(None, None, None)
        self._model, self._hooks, self._calls = None, [], []

    def _before_forward(self, model: nn.Module, args: Any) -> None:
        # Tracing a model traces its hooks, and would keep these. Copies and replicas of a model have its hooks, too.
        if torch.compiler.is_compiling() or model is not self._model:
            return
        call = None
        if model.training and torch.is_grad_enabled() and not any(self._calls):
            context = measure_saved(model)
            call = context, context.__enter__()
            call[1]._enter_module(model, args)  # torch listed this call's hooks before the report added its own
        self._calls.append(call)

    def _after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or model is not self._model:
            return
        # No call at all: somebody else's pre-hook has raised before ours was run.
        if not self._calls or (call := self._calls.pop()) is None:
            return
        context, now = call
        saved, by_module = now.total, now.by_module_now
        context.__exit__(None, None, None)
        if output is not None and saved >= self.report.get("saved", 0):  # None: the forward pass has raised
            self.report |= {"saved": saved, "saved_by_module": by_module, "saved_step": (self._last or 0) + 1}

    def _start_peak(self, args: TrainingArguments) -> None:
        self._peak = PeakMemory(args.device, interval=0.05)
        self._peak.__enter__()

    def _stop(self) -> None:
        self._detach()
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

    def _record(self, state: TrainerState) -> None:
        self._note_peak()
        record = {f"lowmem/{name}": self.report[name] for name in ROWS if name in self.report}
        if "peak" in self.report:
            kind = "cuda" if self.report["peak_source"] == CUDA_SOURCE else "rss"
            record |= {f"lowmem/peak_{kind}": self.report["peak"]}
            record |= {f"lowmem/peak_{kind}_added": self.report["peak_added"]}
        state.log_history.append({**record, "epoch": state.epoch, "step": state.global_step})

    def _show(self, rank_zero: bool) -> None:
        rows = [(label, human_bytes(self.report[name])) for name, label in ROWS.items() if name in self.report]
        if "peak" in self.report:
            rows.append((f"peak ({self.report['peak_source']})", human_bytes(self.report["peak"])))
            rows.append(("  of which since the start", human_bytes(self.report["peak_added"])))
        if not rank_zero:
            logger.info("lowmem: %s", ", ".join(f"{label.strip()} {size}" for label, size in rows))
            return
        from rich.console import Console
        from rich.table import Table

        table = Table("kept in memory", "size", title="hf_lowmem")
        table.columns[1].justify = "right"
        for row in rows:
            table.add_row(*row)
        Console().print(table)
