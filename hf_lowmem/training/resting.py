"""Weights at rest in int8, as a trainer has them: said early, put to rest when all is loaded, resumed to the bit."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.hooks import RemovableHandle

from hf_lowmem.distributed import is_sharded
from hf_lowmem.optim import LowMemOptimizer, StepInBackward
from hf_lowmem.optim.resting import check_rests, rest
from hf_lowmem.specs import STORES_AT_REST, OptimSpec
from hf_lowmem.training.four_bits import keep_dtypes
from hf_lowmem.weights import expect_scales, resting, write_scales

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["LoadState", "RestingWeights", "keep_scales"]

logger = logging.getLogger(__name__)


class RestingWeights:
    """The part of LowMemTrainerMixin that concerns `lowmem_weights="int8_sr"`.

    Weights go to rest before the model is moved to a device, and where it is there already when the optimizer is made;
    shards, when accelerate has put FSDP2 on the model. They stay so when the training ends. On the device there may be
    no room for them in bf16.
    """

    args: object
    model: nn.Module | None
    stepping: StepInBackward | None
    _weights_from: str | None = None  # the checkpoint whose weights the model has

    def _resting_spec(self) -> OptimSpec | None:
        """The optimizer that is asked for, where that is one for weights at rest."""
        return None

    def _later(self, model: nn.Module) -> bool:
        """Whether weights go to rest when accelerate has put FSDP2 on the model, and not before."""
        return bool(getattr(self, "is_fsdp_enabled", False)) and not any(map(is_sharded, model.parameters()))

    def _rehearse_rest(self, spec: OptimSpec | None) -> None:
        """Say now which weights will be at rest, or why none can. The model stays as it is."""
        if spec is None or spec.weights not in STORES_AT_REST or self.model is None:
            return
        if getattr(self.args, "sync_ref_model", False):
            raise ValueError(
                f"sync_ref_model=True cannot be combined with lowmem_weights={spec.weights!r}: TRL mixes values of "
                "both models, and those of the policy are not there. Set one of the two otherwise."
            )
        logger.info("lowmem_weights=%r: %s", spec.weights, check_rests(spec, self.model))

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        spec = self._resting_spec()
        if (
            spec is not None
            and not self._later(model)
            and any(p.device.type != torch.device(device).type for p in model.parameters())
        ):
            self._put_to_rest(spec, model)
        cast("Trainer", super())._move_model_to_device(model, device)

    def _put_to_rest(self, spec: OptimSpec, model: nn.Module, optimizer: LowMemOptimizer | None = None) -> None:
        if spec.weights in STORES_AT_REST and not self._later(model):
            shown = not getattr(getattr(self, "args", None), "disable_tqdm", False)
            found = rest(spec, model, self._weights_from, shown=shown, optimizer=optimizer)
            if optimizer is not None:
                logger.info("lowmem_weights=%r under FSDP2: %s", spec.weights, found)

    def _rest_shards(self) -> None:
        """Put the weights to rest that FSDP2 has cut by now."""
        spec, model = self._resting_spec(), self.model
        if spec is None or model is None or self.stepping is None or not getattr(self, "is_fsdp_enabled", False):
            return
        if not resting(model):
            self._put_to_rest(spec, model, self.stepping.optimizer)

    def _prepare_for_training(self, *args: object, **kwargs: object) -> object:
        """Prepare as the parent does, and put shards to rest."""
        prepared = cast("Trainer", super())._prepare_for_training(*args, **kwargs)
        self._rest_shards()
        return prepared

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load as the parent does, when shards are at rest: a checkpoint's weights are in the model by now."""
        self._rest_shards()
        cast("Trainer", super())._load_optimizer_and_scheduler(checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as the parent does, and the scales of shards at rest beside it: all processes call this."""
        cast("Trainer", super()).save_model(output_dir, _internal_call)
        if self.model is not None and any(kept.home is not None for kept in resting(self.model).values()):
            write_scales(self.model, output_dir or cast("Trainer", self).args.output_dir or ".")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load as the parent does; the scales of weights that were at rest are wanted when they are so again."""
        self._weights_from = resume_from_checkpoint
        if self.model is not None:
            expect_scales(self.model, resume_from_checkpoint)
        with keep_dtypes(self.model):
            cast("Trainer", super())._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = cast("Trainer", self).state.best_model_checkpoint
        if self.model is not None and best is not None:
            expect_scales(self.model, best)
        cast("Trainer", super())._load_best_model()


class LoadState:
    """`accelerator.load_state`, by which FSDP2's shards are loaded before any hook of accelerate's is called."""

    def __init__(self, accelerator: Accelerator, model: nn.Module) -> None:
        self.accelerator, self.model = accelerator, model

    def __call__(
        self, input_dir: str | None = None, load_kwargs: dict[str, object] | None = None, **kwargs: object
    ) -> None:
        settings = self.accelerator.project_configuration
        if input_dir is not None:
            expect_scales(self.model, Path(input_dir).expanduser())
        elif settings.automatic_checkpoint_naming:  # accelerate takes the last, by the number at the end of its name
            folders = list((Path(settings.project_dir or ".") / "checkpoints").iterdir())
            expect_scales(self.model, max(folders, key=lambda folder: int(folder.name.rpartition("_")[2])))
        Accelerator.load_state(self.accelerator, input_dir, load_kwargs, **kwargs)

    def remove(self) -> None:
        """Leave the Accelerator as it was."""
        vars(self.accelerator).pop("load_state", None)


def keep_scales(accelerator: Accelerator, model: nn.Module) -> list[RemovableHandle | LoadState]:
    """Have `save_state` write the scales of a model's weights at rest, and `load_state` want them."""
    loading = LoadState(accelerator, model)
    vars(accelerator)["load_state"] = loading
    write = accelerator.register_save_state_pre_hook(lambda models, weights, folder: write_scales(model, folder))
    return [write, loading]
