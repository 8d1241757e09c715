"""Presets: one word for the fields that most runs set together.

A preset fills fields that have their default, as far as a config has them (`lowmem_reference` is DPO's alone); whatever
is set beside it keeps its value. `lowmem_weights` waits for
the model: `bf16_sr` where weights are bf16, nothing where they are not, or where an engine updates them in fp32.

`auto` is no preset: what it fills in is searched when a trainer knows the model and the memory
(hf_lowmem/planner/search/budget.py). Here it leaves all fields open.
"""

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from accelerate import Accelerator, DistributedType
from torch import nn

from hf_lowmem.specs import check_choice

Settings = Mapping[str, object]

__all__ = ["AUTO", "PRESETS", "WEIGHTS", "fill", "fp32_by", "is_about", "said", "take_weights"]

_SMALL = {"lowmem_state": "8bit", "lowmem_activations": "checkpoint_fp8", "lowmem_reference": "auto"}
PRESETS: dict[str, Settings] = {
    "light": {"optim": "adamw", "lowmem_state": "8bit"},
    "balanced": {"optim": "apollo", **_SMALL},
    "smallest": {"optim": "apollo_mini", **_SMALL, "lowmem_step_in_backward": True, "max_grad_norm": 0.0},
}
WEIGHTS = "bf16_sr"
AUTO = "auto"


class Fields(Protocol):
    """The fields of some arguments that this module itself reads."""

    lowmem: str | None
    lowmem_weights: str | None


def fill(args: Fields, open_names: Iterable[str]) -> Settings:
    """Give the open fields of some arguments what their preset says.

    Args:
        args: arguments with a field `lowmem`.
        open_names: the fields that have their default.

    Returns:
        What was filled in, by field.

    Raises:
        ValueError: where `lowmem` is no preset; where every field of it is set to something else.
    """
    if args.lowmem is None:
        return {}
    check_choice("lowmem", args.lowmem, [*PRESETS, AUTO])
    if args.lowmem == AUTO:
        return {}
    preset = {name: value for name, value in PRESETS[args.lowmem].items() if hasattr(args, name)}
    filled = {name: value for name, value in preset.items() if name in set(open_names)}
    if not filled and all(getattr(args, name) != value for name, value in preset.items()):
        raise ValueError(
            f"lowmem={args.lowmem!r} has no effect: {', '.join(preset)} are all set. Leave it unset, or leave some of "
            "them to it."
        )
    for name, value in filled.items():
        setattr(args, name, value)
    return filled


def said(settings: Settings) -> str:
    """Settings as they are written: "optim=adamw, lowmem_state=8bit"."""
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def is_about(filled: Settings, error: ValueError) -> bool:
    """Whether a refusal names a field that a preset has filled in, by its name or in words."""
    names = [*filled, *(name.removeprefix("lowmem_").replace("_", " ") for name in filled)]
    return any(name in str(error) for name in names)


def fp32_by(accelerator: Accelerator) -> bool:
    """Whether fp32 weights are updated, whatever a model's are: DeepSpeed's copies, or FSDP2's in mixed precision."""
    engine = accelerator.distributed_type
    mixed = accelerator.mixed_precision != "no"
    return engine is DistributedType.DEEPSPEED or (engine is DistributedType.FSDP and mixed)


def take_weights(args: Fields, model: nn.Module, *, fp32: bool) -> None:
    """Have updated weights written as a preset wants it, now that the model is known.

    Args:
        fp32: whether an engine updates fp32 weights, so that there is nothing to round.
    """
    wanted = args.lowmem is not None and args.lowmem_weights is None and not fp32
    if wanted and any(p.dtype is torch.bfloat16 for p in model.parameters() if p.requires_grad):
        args.lowmem_weights = WEIGHTS
