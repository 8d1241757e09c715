"""A training step of forward passes alone, for `optim="mezo"` and its like (hf_lowmem/optim/zeroth).

The host's own `training_step` runs once for each point at which the optimizer asks for a loss, up to the backward pass,
which is not made: what would be handed to `accelerator.backward` is the loss, with all that the host has done to it
(autocast, the share of a micro-batch in its window, the mean over processes). So every trainer whose loss is a function
of weights and batch works as it is: SFT, and all preference losses.

Why not call `compute_loss` by hand: trainers wrap it in contexts of their own, and scale its result in ways that differ
between versions.
"""

from collections.abc import Callable
from threading import get_ident
from typing import cast

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from hf_lowmem.optim import ZEROTH, ZerothOrder
from hf_lowmem.optim.zeroth import put_in_host
from hf_lowmem.runs.skips import ours_in

__all__ = ["SLOPE", "ForwardSteps"]

SLOPE = "lowmem/slope"  # in a log
TOKENS = "_total_train_tokens"  # what TRL counts in each forward pass of training


class ForwardSteps:
    """The part of LowMemTrainerMixin that concerns methods of zeroth order."""

    optimizer: object

    def _check_forwards(self) -> None:
        """Raise where a batch is more than data, or where torch could not load what a checkpoint would have.

        A trainer that makes batches itself would make another for each pass. And of whole states torch loads none that
        is only numbers.
        """
        trainer = cast("Trainer", self)
        args, plugin = trainer.args, getattr(trainer.accelerator.state, "fsdp_plugin", None)
        whole = getattr(getattr(plugin, "state_dict_type", None), "name", None) == "FULL_STATE_DICT"
        saves = args.save_strategy != "no" and not args.save_only_model
        if whole and saves and args.optim in ZEROTH and not ZEROTH[args.optim].STATES:
            raise ValueError(
                f"fsdp_config['state_dict_type']='FULL_STATE_DICT' cannot be combined with optim={args.optim!r}, whose "
                "state is a few numbers: torch loads no such checkpoint. Set it to 'SHARDED_STATE_DICT', or set "
                "save_only_model=True or save_strategy='no'."
            )
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

        handed: dict[int, list[torch.Tensor]] = {}  # by thread: passes may run side by side
        counted = before

        def loss() -> torch.Tensor:
            nonlocal counted
            handed[get_ident()] = []
            step()
            if before is not None:  # a batch counts once, however many passes it makes
                counted = max(counted, getattr(self, TOKENS))
                setattr(self, TOKENS, before)
            (found,) = handed.pop(get_ident())
            return found

        here["backward"] = lambda loss, **kwargs: handed[get_ident()].append(loss.detach())
        try:
            mean = optimizer.probe(loss)
        finally:
            del here["backward"]
            here.update(theirs)
            if before is not None:
                setattr(self, TOKENS, counted)
        return torch.tensor(mean, device=trainer.args.device)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Move as the parent does, but for layers whose weights are to wait in host memory."""
        self._host_weights(model, torch.device(device))
        cast("Trainer", super())._move_model_to_device(model, device)

    def _host_weights(self, model: nn.Module, device: torch.device) -> None:
        args = cast("Trainer", self).args
        if getattr(args, "lowmem_offload", None) != "weights":
            return
        if getattr(args, "sync_ref_model", False):
            raise ValueError(
                "sync_ref_model=True cannot be combined with lowmem_offload='weights': TRL mixes weights of two models "
                "on one device. Set one of the two otherwise."
            )
        put_in_host(model, device)

    def train(self, *args: object, **kwargs: object) -> TrainOutput:
        """Train as the parent does; at the end no weight has an update that waits for its layer."""
        try:
            return cast("Callable[..., TrainOutput]", cast("Trainer", super()).train)(*args, **kwargs)
        finally:
            if (optimizer := self._forward_only()) is not None:
                optimizer.settle()

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
