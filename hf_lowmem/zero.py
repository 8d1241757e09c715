"""What goes with DeepSpeed's ZeRO: methods that work element by element, under its stages 1 and 2.

ZeRO-1 and ZeRO-2 flatten all weights of a parameter group into one fp32 vector, cut it into equal parts without regard
to where one weight ends, and give each process one part, a "partition", as the only parameter of the group. So

- a method that needs matrices or a norm of each weight (everything low-rank, SOAP, LAMB) cannot work and is refused;
- weights of fewer than 4,096 values, which keep fp32 states, are given groups of their own (`from_spec(flat=True)`):
  inside the vector their borders are gone. A partition of fewer than 4,096 values keeps fp32 states as well;
- a block of a codec may hold the end of one weight and the beginning of the next. With fp32 states a run is that of one
  process; with a codec it is as near to it as two placements of the blocks are;
- at a gradient with a NaN, DeepSpeed leaves out the step; told not to look (bf16.check_grad_overflow: false), the whole
  partition with the NaN stays as it was, not one weight;
- the weights that a method updates are fp32, so that a store for bf16 weights would do nothing: refused.

Checkpoints are DeepSpeed's own. Its plain ones hold `state_dict()` of the optimizer and continue bit for bit on as many
processes; on another number DeepSpeed refuses them. Its elastic and universal ones cut and pad every state as if it had
the weights' size, which scales have not: refused. So is offloading: accelerate would put DeepSpeed's CPU Adam in the
place of the optimizer.

Why not stage 3: it also cuts the weights, with hooks of its own that were not tested here; FSDP2 does the same, with
every method.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

STAGES = (1, 2)
INSTEAD = "Use FSDP2 (fsdp=True; accelerate: distributed_type: FSDP with fsdp_version: 2) or DDP"


def check_method(
    label: str, name: str, elementwise: Collection[str], *, weights: str | None, step_in_backward: bool
) -> None:
    """Raise where an optimizer of ours cannot work on flattened weights.

    Args:
        label: what asks for DeepSpeed, as the user wrote it.
        name: the method, and `elementwise` those that work.
        weights, step_in_backward: the fields `lowmem_weights` and `lowmem_step_in_backward`.

    Raises:
        ValueError: with the remedy.
    """
    if name not in elementwise:
        raise ValueError(
            f"{label} with optim={name!r}: DeepSpeed's ZeRO flattens the weights and cuts them anywhere, and {name} "
            f"needs whole matrices. {INSTEAD}; under ZeRO-1 and ZeRO-2 these work: {', '.join(elementwise)}."
        )
    if weights not in (None, "keep"):
        raise ValueError(
            f"lowmem_weights={weights!r} with {label}: ZeRO keeps fp32 copies of the weights and has those updated, so "
            f"there is nothing to round. Leave lowmem_weights unset. {INSTEAD} to do without the copies."
        )
    if step_in_backward:
        raise ValueError(
            f"lowmem_step_in_backward=True with {label}: ZeRO takes each gradient away in backward and steps at its "
            "end. Leave it unset, or set fsdp=True (FSDP2)."
        )


def check_config(label: str, config: Mapping[str, Any], setting: str, *, optimizer: bool) -> None:
    """Raise where DeepSpeed's own settings do not go with an optimizer or with activation tiers of ours.

    Args:
        label: whose settings they are, as the user wrote it.
        config: in the form of DeepSpeed's JSON.
        setting: the field of ours, with its value.
        optimizer: whether that is an optimizer; else it is the tiers, for which the stage alone matters.

    Raises:
        ValueError: naming the key, its value, the reason and the remedy.
    """
    zero = _section(config, "zero_optimization")
    stage = zero.get("stage", 0)
    if str(stage) not in map(str, STAGES):
        third = "ZeRO-3 cuts the weights themselves, which was not tested"
        reason = third if str(stage) == "3" else "without ZeRO it only does what DDP does"
        raise ValueError(
            f"{label}: zero_optimization.stage={stage!r} with {setting} is not supported: {reason}. Set 1 or 2. "
            f"Otherwise: {INSTEAD}."
        )
    if not optimizer:
        return
    device = _section(zero, "offload_optimizer").get("device") or "none"
    for key, value, reason, remedy in (
        ("optimizer", config.get("optimizer"), "DeepSpeed would make that one instead", "Remove this section"),
        (
            "zero_optimization.offload_optimizer.device",
            None if device == "none" else device,
            "accelerate would put DeepSpeed's CPU Adam in its place",
            "Set it to none; lowmem_state='8bit' makes the state small",
        ),
        (
            "zero_optimization.elastic_checkpoint",
            zero.get("elastic_checkpoint"),
            "it cuts every state as if it had the weights' size, which scales have not",
            "Set it to false",
        ),
        (
            "checkpoint.load_universal",
            _section(config, "checkpoint").get("load_universal"),
            "it cuts every state as if it had the weights' size, which scales have not",
            "Set it to false",
        ),
    ):
        if value:
            raise ValueError(f"{label}: {key}={value!r} cannot be combined with {setting}: {reason}. {remedy}.")


def from_yaml(label: str, content: Mapping[str, Any]) -> Mapping[str, Any]:
    """DeepSpeed's settings, as far as they matter here, from an accelerate YAML.

    Raises:
        TypeError, ValueError, FileNotFoundError: where `deepspeed_config`, or the file that it names, cannot be read.
    """
    values = content.get("deepspeed_config") or {}
    if not isinstance(values, Mapping):
        raise TypeError(f"{label}: deepspeed_config={values!r}: expected keys with values.")
    file = values.get("deepspeed_config_file")
    if file:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError(f"{label}: deepspeed_config_file: {file} holds no JSON object.")
        return found
    stage = values.get("zero_stage", 2)  # accelerate's default
    device = values.get("offload_optimizer_device") or "none"
    return {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": device}}}


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = config.get(key)
    return found if isinstance(found, Mapping) else {}
