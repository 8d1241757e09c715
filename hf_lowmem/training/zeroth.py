"""A training step of forward passes alone, for `optim="mezo"` and its like (hf_lowmem/optim/zeroth).

The host's own `training_step` runs once for each point at which the optimizer asks for a loss, up to the backward pass,
which is not made: what would be handed to `accelerator.backward` is the loss, with all that the host has done to it
(autocast, the share of a micro-batch in its window, the mean over processes). So every trainer whose loss is a function
of weights and batch works as it is: SFT, and all preference losses.

Why not call `compute_loss` by hand: trainers wrap it in contexts of their own, and scale its result in ways that differ
between versions.
"""

from collections.abc import Callable
from typing import cast

import torch
from transformers import Trainer

from hf_lowmem.optim import ZEROTH, ZerothOrder
from hf_lowmem.runs.skips import ours_in

__all__ = ["SLOPE", "ForwardSteps"]

SLOPE = "lowmem/slope"  # in a log
TOKENS = "_total_train_tokens"  # what TRL counts in each forward pass of training


class ForwardSteps:
    """The part of LowMemTrainerMixin that concerns methods of zeroth order."""

    optimizer: object

    def _check_forwards(self) -> None:
        """Raise where a batch is more than data: a trainer that makes it itself would make another for each pass."""
        args = cast("Trainer", self).args
        owner = next(c for c in type(self).__mro__ if "_prepare_inputs" in vars(c))
        if args.optim in ZEROTH and owner is not Trainer:
            raise ValueError(
                f"optim={args.optim!r} cannot be used in {type(self).__name__}: {owner.__name__} makes its "
                "batches while it trains, such as by generating answers, and would make others for each forward pass. "
                "Take a method of first order, or train on pairs or texts (SFT, DPO)."
            )

    def _forward_only(self) -> ZerothOrder | None:
        """The optimizer, where it is one that takes losses."""
        ours = ours_in(self.optimizer)
        return ours if isinstance(ours, ZerothOrder) else None

    def _step_of(self, step: Callable[[], torch.Tensor]) -> torch.Tensor:
        """One training step: `step` itself, or its losses for an optimizer that asks for them."""
        optimizer = self._forward_only()
        if optimizer is None:
            return step()
        trainer, before = cast("Trainer", self), getattr(self, TOKENS, None)
        here = vars(trainer.accelerator)
        theirs = {name: here[name] for name in ("backward",) if name in here}

        def loss() -> torch.Tensor:
            if before is not None:  # a batch counts once, however many passes it makes
                setattr(self, TOKENS, before)
            handed: list[torch.Tensor] = []
            here["backward"] = lambda loss, **kwargs: handed.append(loss.detach())
            try:
                step()
            finally:
                del here["backward"]
                here.update(theirs)
            (found,) = handed
            return found

        return torch.tensor(optimizer.probe(loss), device=trainer.args.device)

    def _forget_window(self) -> None:
        """Forget losses of a window that an exception, or an attempt with another batch size, has not ended."""
        if (optimizer := self._forward_only()) is not None:
            optimizer.zero_grad()

    def _log_slope(self, logs: dict[str, float]) -> None:
        """Put the slope along the last step's directions into a row of training, for a norm that is not there."""
        optimizer = self._forward_only()
        if optimizer is not None and "loss" in logs and optimizer.slopes:
            logs.pop("grad_norm", None)
            logs[SLOPE] = sum(abs(slope) for slope in optimizer.slopes)
