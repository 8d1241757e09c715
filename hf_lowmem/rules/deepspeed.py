"""Rules of DeepSpeed's ZeRO: methods that work element by element go with it, under its stages 1 and 2.

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
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from hf_lowmem.optim import elementwise
from hf_lowmem.reasons import CAUTIOUS_FLAT, TO_FSDP2, needs_matrices, nothing_to_round
from hf_lowmem.rules.rule import Rule
from hf_lowmem.rules.run import Run

STAGES = (1, 2)
CUT = "it cuts every state as if it had the weights' size, which scales have not"
# (key, reason, remedy): what DeepSpeed's own settings must not say beside an optimizer of ours.
SETTINGS = (
    ("optimizer", "DeepSpeed would make that one instead", "Remove this section"),
    (
        "zero_optimization.offload_optimizer.device",
        "accelerate would put DeepSpeed's CPU Adam in its place",
        "Set it to none; lowmem_state='8bit' makes the state small",
    ),
    ("zero_optimization.elastic_checkpoint", CUT, "Set it to false"),
    ("checkpoint.load_universal", CUT, "Set it to false"),
)


def _under(value: object, key: str) -> object:
    return cast("Mapping[str, object]", value).get(key) if isinstance(value, Mapping) else None


def _value(config: Mapping[str, Any], key: str) -> Any:
    """The value under a dotted key of DeepSpeed's settings; None for nothing."""
    value: object = config
    for part in key.split("."):
        value = _under(value, part)
    return None if value == "none" else value


def _stage(run: Run) -> Any:
    return _value(run.zero or {}, "zero_optimization.stage") or 0


def _refused_stage(run: Run) -> bool:
    return run.engine == "deepspeed" and run.asked is not None and str(_stage(run)) not in map(str, STAGES)


def _why_not_this_stage(run: Run) -> str:
    third = "ZeRO-3 cuts the weights themselves, which was not tested"
    reason = third if str(_stage(run)) == "3" else "without ZeRO it only does what DDP does"
    return f"zero_optimization.stage={_stage(run)!r} cannot be combined with {run.asked}: {reason}"


def _setting(key: str, reason: str, remedy: str) -> Rule:
    return Rule(
        f"zero_{key}",
        ("engine", "zero", "optim"),
        lambda run: run.engine == "deepspeed" and run.ours and bool(_value(run.zero or {}, key)),
        lambda run: f"{key}={_value(run.zero or {}, key)!r} cannot be combined with {run.say('optim')}: {reason}",
        remedy,
    )


RULES = (
    Rule(
        "zero_matrices",
        ("engine", "optim"),
        lambda run: run.engine == "deepspeed" and run.ours and run.optim not in elementwise(),
        lambda run: (
            f"{run.say('engine')} cannot be combined with {run.say('optim')}: ZeRO flattens the weights and cuts them "
            f"anywhere, and {needs_matrices(str(run.optim), elementwise())}"
        ),
        "",
    ),
    Rule(
        "zero_cautious",
        ("engine", "spec"),
        lambda run: run.engine == "deepspeed" and run.spec is not None and bool(run.spec.options.get("cautious")),
        lambda run: f"optim_args: cautious=True cannot be combined with {run.say('engine')}: {CAUTIOUS_FLAT}",
        "",
    ),
    Rule(
        "zero_weights",
        ("engine", "fields"),
        lambda run: (
            run.engine == "deepspeed" and run.ours and (run.fields or {}).get("lowmem_weights") not in (None, "keep")
        ),
        lambda run: (
            f"lowmem_weights={(run.fields or {})['lowmem_weights']!r} has no effect with {run.say('engine')}: "
            f"{nothing_to_round('lowmem_weights')}"
        ),
        "",
    ),
    Rule(
        "zero_in_backward",
        ("engine", "in_backward"),
        lambda run: run.engine == "deepspeed" and bool(run.in_backward),
        lambda run: (
            f"{run.say('in_backward')} cannot be combined with {run.say('engine')}: ZeRO takes each gradient away in "
            "backward and steps at its end"
        ),
        "Leave it unset, or set fsdp=True (FSDP2)",
    ),
    Rule("zero_stage", ("engine", "zero"), _refused_stage, _why_not_this_stage, f"Set 1 or 2. Otherwise: {TO_FSDP2}"),
    *(_setting(*row) for row in SETTINGS),
)


def from_yaml(label: str, content: Mapping[str, Any]) -> Mapping[str, Any]:
    """DeepSpeed's settings, as far as they matter here, from those of accelerate's launcher.

    Raises:
        TypeError, ValueError, FileNotFoundError: where `deepspeed_config`, or the file that it names, cannot be read.
    """
    given: object = content.get("deepspeed_config") or {}
    if not isinstance(given, Mapping):
        raise TypeError(f"{label}: deepspeed_config={given!r}: expected keys with values.")
    values = cast("Mapping[str, Any]", given)
    file = values.get("deepspeed_config_file")
    if file:
        found: object = json.loads(Path(file).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError(f"{label}: deepspeed_config_file: {file} holds no JSON object.")
        return cast("Mapping[str, Any]", found)
    stage = values.get("zero_stage", 2)  # accelerate's default
    device = values.get("offload_optimizer_device") or "none"
    return {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": device}}}
