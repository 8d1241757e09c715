"""Weights at rest in int8, as a trainer has them: said early, put to rest when all is loaded, resumed to the bit."""

import logging
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from hf_lowmem.optim.resting import check_rests, rest
from hf_lowmem.specs import STORES_AT_REST, OptimSpec
from hf_lowmem.weights import expect_scales

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["RestingWeights"]

logger = logging.getLogger(__name__)


class RestingWeights:
    """The part of LowMemTrainerMixin that concerns `lowmem_weights="int8_sr"`.

    Weights go to rest before the model is moved to a device, and where it is there already when the optimizer is made;
    they stay so when the training ends. On the device there may be no room for them in bf16.
    """

    args: object
    model: nn.Module | None
    _weights_from: str | None = None  # the checkpoint whose weights the model has

    def _resting_spec(self) -> OptimSpec | None:
        """The optimizer that is asked for, where that is one for weights at rest."""
        return None

    def _rehearse_rest(self, spec: OptimSpec) -> None:
        """Say now which weights will be at rest, or why none can. The model stays as it is."""
        if spec.weights not in STORES_AT_REST or self.model is None:
            return
        if getattr(self.args, "sync_ref_model", False):
            raise ValueError(
                f"sync_ref_model=True cannot be combined with lowmem_weights={spec.weights!r}: TRL mixes values of "
                "both models, and those of the policy are not there. Set one of the two otherwise."
            )
        logger.info("lowmem_weights=%r: %s", spec.weights, check_rests(spec, self.model))

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        spec = self._resting_spec()
        if spec is not None and any(p.device.type != torch.device(device).type for p in model.parameters()):
            self._put_to_rest(spec, model)
        cast("Trainer", super())._move_model_to_device(model, device)

    def _put_to_rest(self, spec: OptimSpec, model: nn.Module) -> None:
        if spec.weights in STORES_AT_REST:
            rest(spec, model, self._weights_from, shown=not getattr(getattr(self, "args", None), "disable_tqdm", False))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load as the parent does; the scales of weights that were at rest are wanted when they are so again."""
        self._weights_from = resume_from_checkpoint
        if self.model is not None:
            expect_scales(self.model, resume_from_checkpoint)
        cast("Trainer", super())._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = cast("Trainer", self).state.best_model_checkpoint
        if self.model is not None and best is not None:
            expect_scales(self.model, best)
        cast("Trainer", super())._load_best_model()
