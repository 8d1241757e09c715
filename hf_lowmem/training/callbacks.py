"""Callbacks for an unmodified Trainer.

    LowMemCallback          lets the model keep less for backward, and reports what training keeps: what the fields do
    MemoryReportCallback    the report alone; see `hf_lowmem.runs.callback`

Both work with the Trainer as it is, beside `optimizers=(make_optimizer(...), None)` or any other optimizer.
"""

import functools
import weakref
from typing import Any

from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from hf_lowmem import rules
from hf_lowmem.activations import OwnedTiers, rehearsal
from hf_lowmem.runs.callback import MemoryReportCallback
from hf_lowmem.specs import ActivationSpec
from hf_lowmem.training.arguments import trainers

__all__ = ["LowMemCallback", "MemoryReportCallback"]


class LowMemCallback(MemoryReportCallback):
    """A MemoryReportCallback that also lets the model keep less for backward.

        callback = LowMemCallback("fp8")
        trainer = Trainer(model, args, train_dataset=data, callbacks=[callback], optimizers=(optimizer, None))

    activations: a tier, or tiers by layer, as for `activations.convert`, whose report is `callback.activations`. None:
              leave the model alone. They are on the model while it is trained, and taken off when training ends, also
              by an exception (for a callback that is added later: after `callback.add_to(trainer)`)
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
        self._tiers: OwnedTiers | None = None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_tiers": None}  # the model is not the copy's

    def add_to(self, trainer: Trainer) -> "LowMemCallback":
        """Adds the callback; and an exception in `trainer.train()` takes the tiers off, too."""
        super().add_to(trainer)
        self._close_after_training(trainer)
        return self

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        model = kw.get("model")
        if self.spec is None or model is None:
            return
        self._check(args)
        with rehearsal(model, self.spec) as self.activations:
            pass
        trainer = _trainer_of(self)
        if trainer is not None:
            self._close_after_training(trainer)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        super().on_train_begin(args, state, control, **kw)
        model = kw.get("model")
        if self.spec is None or model is None or (self._tiers is not None and self._tiers.model is model):
            return
        self._check(args)
        self.take_off()  # of a model of `model_init`
        self._tiers = OwnedTiers(model, self.spec, f"LowMemCallback(activations={self.spec.tiers!r})")
        self.activations = self._tiers.report
        # After an exception in a training that could not be watched, at the latest with the callback itself.
        weakref.finalize(self, self._tiers.take_off).atexit = False

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        super().on_step_begin(args, state, control, **kw)
        if self._tiers is not None:
            self._tiers.at_step(state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        super().on_train_end(args, state, control, **kw)
        self.take_off()

    def close(self) -> None:
        """Take away what a training that ended in an exception has left: the tiers, too."""
        super().close()
        self.take_off()

    def take_off(self) -> None:
        """Leave the model as it was found. Training does that at its end."""
        if self._tiers is not None:
            self._tiers.take_off()
            self._tiers = None

    def _close_after_training(self, trainer: Trainer) -> None:
        """An event tells when a training has ended, but none when an exception has ended it."""
        train = trainer.train
        if self.spec is None or getattr(train, "closes", None) is self:
            return

        @functools.wraps(train)
        def closing(*args: Any, **kwargs: Any) -> Any:
            try:
                return train(*args, **kwargs)
            finally:
                self.close()

        closing.closes = self  # type: ignore[attr-defined]
        trainer.train = closing

    def _check(self, args: TrainingArguments) -> None:
        assert self.spec is not None
        asked = f"LowMemCallback(activations={self.spec.tiers!r})"
        field = getattr(args, "lowmem_activations", None)
        if field is not None:
            raise ValueError(
                f"lowmem_activations={field!r} cannot be combined with {asked}: a model's tiers have one owner. Leave "
                "one of the two unset."
            )
        rules.check(rules.Run.from_arguments(args).knowing({"tiers": asked}, tiers=self.spec.tiers))


def _trainer_of(callback: LowMemCallback) -> Trainer | None:
    """The trainer that is being made and has this callback."""
    handlers = ((trainer, getattr(trainer, "callback_handler", None)) for trainer in list(trainers))
    return next((trainer for trainer, has in handlers if has is not None and callback in has.callbacks), None)
