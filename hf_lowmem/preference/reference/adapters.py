"""When the policy without its adapter is the model that was passed, and when it is not."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

import torch
from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["check_adapter", "whole_copies"]

# Ways of PEFT to initialise an adapter that take it out of the base's weights, by how their names begin.
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
FROZEN = "ref"  # TRL's name for its copy of an adapter that was trained before
TRAINED = "default"  # its name for that adapter


def check_adapter(kind: str, model: Any, peft_config: Any) -> None:
    """Raise where the reference of a PEFT policy would be another model than the one that was passed, or would change.

    Args:
        kind: "adapter", for which the reference runs beside the training, or "precomputed".
        model: as passed: a PEFT model, or one that becomes it with `peft_config`.
        peft_config: as passed.

    Raises:
        ValueError: naming the setting of the adapter, the reason and the remedy.
    """
    config = peft_config
    if config is None:
        configs = model.peft_config
        active = [model.active_adapter] if isinstance(model.active_adapter, str) else list(model.active_adapter)
        if active != ["default"] or "default" not in configs:
            raise ValueError(
                f"active_adapter={active}: TRL's reference of a PEFT model is a copy of its adapter 'default', not of "
                "what would be trained. Name the adapter 'default' when it is made or loaded, or pass ref_model."
            )
        if FROZEN in configs:
            raise ValueError(
                "the PEFT model has an adapter 'ref' already, which is how TRL calls its frozen copy of 'default' (an "
                "earlier DPOTrainer leaves it). Call model.delete_adapter('ref') first, or pass ref_model."
            )
        config = configs["default"]
    how = getattr(config, "init_lora_weights", None)
    if isinstance(how, str) and how.lower().startswith(CHANGES_THE_BASE):
        remedy = "Set init_lora_weights=True, or pass ref_model (with lowmem_reference='precomputed' it is freed)."
        if peft_config is None:
            remedy = (
                "Set model.peft_config['default'].init_lora_weights=True, which leaves the adapter's weights as they "
                "are, or pass ref_model."
            )
        raise ValueError(
            f"init_lora_weights={how!r} takes the adapter out of the base's weights, so the model without its adapter "
            f"is not the model that was passed, and no reference for it. {remedy}"
        )
    if kind == "adapter" and (trained := _trained_of_the_base(model, config, wrapped=peft_config is None)):
        raise ValueError(
            f"{trained} of the base are trained beside the adapter, so that the policy without its adapter changes in "
            "training and is no reference. Set lowmem_reference='precomputed', or pass ref_model."
        )


def _trained_of_the_base(model: Any, config: Any, *, wrapped: bool) -> str | None:
    """Trained weights of a policy that disabling its adapter does not undo, in words; None where there are none."""
    bias = getattr(config, "bias", "none")
    if isinstance(bias, str) and bias != "none":
        return f"bias={bias!r}: biases"
    if not wrapped:
        return None
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING  # PEFT may be missing where nobody has a PEFT model

    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type) or "\0"
    names = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and prefix not in name and set(model.peft_config).isdisjoint(name.split("."))
    ]
    return f"{len(names)} weights ({names[0]!r}, ...)" if names else None


@contextlib.contextmanager
def whole_copies(model: "PeftModel") -> Iterator[None]:
    """Let the frozen copy that DPOTrainer's constructor makes of a PEFT model's adapter be a copy of all of it.

    TRL copies what has ".default." in its name. Tensors that PEFT keeps by themselves, and not in a module, end in
    ".default" (of IA3 and VeRA all, of LoRA those of an embedding and of trained tokens). Their copies would
    keep what a new adapter begins with, which is another model.

    Raises:
        ValueError: in the constructor, where a trained tensor of the adapter has no place in the copy.
    """
    add = cast("Callable[..., object]", model.add_adapter)

    def add_whole(name: str, *args: object, **kwargs: object) -> object:
        result = add(name, *args, **kwargs)
        if name == FROZEN:
            _copy(model)
        return result

    with mock.patch.object(model, "add_adapter", add_whole):
        yield


@torch.no_grad()
def _copy(model: nn.Module) -> None:
    """Write the adapter that is trained over its frozen copy."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if TRAINED not in parts:
            continue
        copied = tensors.get(".".join(FROZEN if part == TRAINED else part for part in parts))
        if copied is None or copied.shape != tensor.shape:
            if not tensor.requires_grad:
                continue
            raise ValueError(
                f"TRL's reference of a PEFT model is a frozen copy of its adapter {TRAINED!r}, and PEFT makes none of "
                f"{name!r}. Pass ref_model; with lowmem_reference='precomputed' it is freed before training."
            )
        copied.copy_(tensor)
