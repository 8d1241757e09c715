"""Callbacks for an unmodified Trainer.

    LowMemCallback          lets the model keep less for backward, and reports what training keeps: what the fields do
    MemoryReportCallback    the report alone; see `hf_lowmem.report`

Both work with the Trainer as it is, beside `optimizers=(make_optimizer(...), None)` or any other optimizer.
"""

from typing import Any

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_lowmem import rules
from hf_lowmem.activations import Report, convert
from hf_lowmem.report import MemoryReportCallback
from hf_lowmem.specs import ActivationSpec

__all__ = ["LowMemCallback", "MemoryReportCallback"]


class LowMemCallback(MemoryReportCallback):
    """A MemoryReportCallback that also lets the model keep less for backward.

        callback = LowMemCallback("fp8")
        trainer = Trainer(model, args, train_dataset=data, callbacks=[callback], optimizers=(optimizer, None))

    activations: a tier, or tiers by layer, as for `activations.convert`, whose report is `callback.activations`. None:
              leave the model alone
    every, verbose, trim: as for MemoryReportCallback

    Raises TypeError or ValueError for a tier that does not exist, or beside a setting that leaves it nothing to do.
    """

    def __init__(
        self,
        activations: str | ActivationSpec | None = None,
        *,
        every: int | None = None,
        verbose: bool = True,
        trim: bool = True,
    ) -> None:
        super().__init__(every=every, verbose=verbose, trim=trim)
        self.spec = ActivationSpec(tiers=activations) if isinstance(activations, str) else activations
        if self.spec is not None and not isinstance(self.spec, ActivationSpec):
            raise TypeError(f"activations={activations!r}: expected a tier, such as 'fp8', or None.")
        self.activations: Report | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._convert(args, kw.get("model"))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        super().on_train_begin(args, state, control, **kw)
        self._convert(args, kw.get("model"))  # of `model_init`, or where the callback was added late

    def _convert(self, args: TrainingArguments, model: nn.Module | None) -> None:
        if self.spec is None or model is None:
            return
        tiers = self.spec.tiers
        run = rules.Run.from_arguments(args)
        rules.check(run.knowing({"tiers": f"LowMemCallback(activations={tiers!r})"}, tiers=tiers))
        self.activations = convert(model, self.spec)
