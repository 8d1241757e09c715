"""A model that was passed is the reference that is meant: as it is, not as it once was on the hub.

TRL says that it makes a copy of the policy where no `ref_model` is passed, and loads one from the name in the policy's
config. For a name these are the same. A model in memory may have been trained since it was loaded (an SFT stage in the
same process), and a reference from the name is then another model, without a word. So the copy is made of the model.
"""

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from trl.trainer import dpo_trainer

__all__ = ["copied_reference", "own_modules_only"]

logger = logging.getLogger(__name__)
PASS_ONE = "Pass the reference itself as ref_model"


@contextlib.contextmanager
def copied_reference(model: Any) -> Iterator[None]:
    """Give DPOTrainer's constructor a copy of `model` where it would load a reference by the name of `model`.

    Where the weights of `model` are partitioned among processes (ZeRO-3) there is nothing whole to copy: then TRL loads
    by the name, and a warning says so.
    """
    load = dpo_trainer.create_model_from_path

    def copied(name: str, *args: Any, **kwargs: Any) -> Any:
        if any(hasattr(p, "ds_id") for p in model.parameters()):
            logger.warning(
                "the model that was passed is partitioned and cannot be copied, so the reference model is loaded from "
                "%r. If the model was trained since it was loaded from there, pass its copy as ref_model.",
                name,
            )
            return load(name, *args, **kwargs)
        return _copy_of(model)

    with mock.patch.object(dpo_trainer, "create_model_from_path", copied):
        yield


def _copy_of(model: Any) -> Any:
    try:
        made = copy.deepcopy(model)
    except (TypeError, RuntimeError, NotImplementedError, AttributeError, ValueError) as error:
        raise ValueError(
            f"ref_model=None with a {type(model).__name__} in memory: its reference is a copy of it, and it cannot be "
            f"copied ({error}). {PASS_ONE}, or set lowmem_reference='precomputed', which needs no copy."
        ) from error
    return made.eval()


@contextlib.contextmanager
def own_modules_only(policy: nn.Module) -> Iterator[None]:
    """Make each call of a module of `policy` an error: a copy may hold on to the original by a patched `forward`, and
    would then change as the policy is trained.

    Raises:
        ValueError: in the forward pass that does it.
    """
    modules = {id(m) for m in policy.modules()}

    def refuse(module: nn.Module, _: Any) -> None:
        if id(module) in modules:
            raise ValueError(
                f"ref_model=None: the copy of the model in memory that serves as its reference calls the original's "
                f"{type(module).__name__}, because something has put another `forward` on the model. {PASS_ONE}."
            )

    handle = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()
