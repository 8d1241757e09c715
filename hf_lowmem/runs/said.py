"""The two blocks that a run prints: at its start what is on, at its end what that took.

They say what is known, and no more. What AdamW would take beside is arithmetic on the model's own parameters: a
gradient and two moments in the dtype of each that is trained, and an fp32 count of steps for it. So it is labelled as
predicted, and there is none where an engine shards what the parameters do not show (DeepSpeed). A peak is predicted
only where a plan was made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

import hf_lowmem
from hf_lowmem.activations import Report
from hf_lowmem.distributed import local
from hf_lowmem.memory import human_bytes, parameter_bytes
from hf_lowmem.memory.free import free_and_total
from hf_lowmem.optim import ALL_METHODS, group_table
from hf_lowmem.optim.base import LowMemOptimizer
from hf_lowmem.runs.facts import device_name
from hf_lowmem.runs.parts import PARTS, STATIC
from hf_lowmem.weights import at_rest

__all__ = ["adamw_parts", "at_end", "at_start", "is_quiet"]

ADAMW = "AdamW (predicted)"
COUNT = 4  # bytes of torch's count of steps, one a parameter


def is_quiet(args: TrainingArguments) -> bool:
    """Whether a user has asked for errors alone."""
    return args.log_level in ("error", "critical")


def adamw_parts(model: nn.Module, args: TrainingArguments) -> dict[str, int]:
    """Bytes by part of the same model under HuggingFace's AdamW; nothing under DeepSpeed, which has its own vectors."""
    if getattr(args, "deepspeed", None) or getattr(args, "deepspeed_plugin", None):
        return {}
    trained = [p for p in model.parameters() if p.requires_grad]
    coded = [p for p in model.parameters() if at_rest(p) is not None]
    with torch.no_grad():
        size, resting = (sum(_dense(p) for p in some) for some in (trained, coded))
    weights = parameter_bytes(model) - parameter_bytes(coded) + resting
    return {"weights": weights, "gradients": size, "optimizer": 2 * size + COUNT * len(trained)}


def _dense(p: Tensor) -> int:
    """Bytes of a parameter's values in its own dtype, of this process's shard, also where they are at rest."""
    return local(p).numel() * p.element_size()


def at_start(
    args: TrainingArguments,
    model: nn.Module,
    optimizer: object,
    *,
    trainer: str | None,
    activations: Report | None,
    predicted: Mapping[str, object] | None,
) -> str:
    """Device and its free memory, the model, what is on; and the peak, where a plan has predicted it.

    Args:
        optimizer: ours, or None where it is somebody else's.
        trainer: its class's name.
        activations: what the tiers have done to the model.
        predicted: figures of a plan, as a report holds them.
    """
    free, total = free_and_total(args.device)
    room = f"; {human_bytes(free)} of {human_bytes(total)} free" if free is not None and total is not None else ""
    whole = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    count = "all trained" if trained == whole else f"{trained:,} of them trained"
    rows = [
        ("device", device_name(args.device) + (f", one of {args.world_size}" if args.world_size > 1 else "") + room),
        ("model", f"{whole:,} parameters, {count}"),
        ("on", ", ".join(_settings(args)) or "none of hf_lowmem's fields"),
    ]
    if activations is not None and activations.layers:
        converted = sum(layer.tier is not None for layer in activations.layers)
        rest = "" if converted == len(activations.layers) else "; the others stay as they are (trainer.activations)"
        rows.append(("activations", f"{activations.tiers} in {converted} of {len(activations.layers)} layers{rest}"))
    if isinstance(optimizer, LowMemOptimizer):
        rows.append(("optimizer", _states(optimizer, model, args)))
    if predicted is not None and isinstance(peak := predicted.get("peak_bytes"), int):
        rows.append(("peak", f"{human_bytes(peak)} predicted, of tensors alone, at full batches"))
    heading = f"hf_lowmem {hf_lowmem.__version__}" + (f", {trainer}" if trainer else "")
    return "\n".join([heading, *(f"  {name:<13}{text}" for name, text in rows)])


def _settings(args: TrainingArguments) -> list[str]:
    """The fields that are on, as one writes them."""
    optim = str(getattr(args.optim, "value", args.optim))
    found: dict[str, object] = {"optim": optim} if optim in ALL_METHODS else {}
    names = [f.name for f in fields(args) if f.name.startswith("lowmem")]
    found |= {name: value for name in names if (value := getattr(args, name)) is not None and value is not False}
    if found and args.gradient_checkpointing:
        found["gradient_checkpointing"] = True
    return [f"{name}={value}" for name, value in found.items()]


def _states(optimizer: LowMemOptimizer, model: nn.Module, args: TrainingArguments) -> str:
    """The rules by which parameters are stepped, and the bytes of their states."""
    rows = group_table(optimizer)
    rules = ", ".join(dict.fromkeys(str(row["rule"]) for row in rows))
    beside = adamw_parts(model, args)
    if args.world_size > 1 or not beside:  # a shard's share is known when it is there
        return rules
    size = sum(int(row["state_bytes"]) for row in rows)
    return f"{rules}; its state {human_bytes(size)} predicted, AdamW's {human_bytes(beside['optimizer'])}"


def at_end(
    report: Mapping[str, object],
    beside: Mapping[str, int],
    *,
    heading: str,
    notes: Sequence[str],
    same_activations: bool,
) -> str:
    """Measured parts and peak, beside what AdamW would take.

    Args:
        report: MemoryReportCallback.report.
        beside: result of `adamw_parts`.
        heading: the first line.
        notes: the last lines.
        same_activations: whether layers keep what they keep without hf_lowmem.
    """
    measured = {name: value for name, value in report.items() if isinstance(value, int)}
    rows = []
    for name, part in PARTS.items():
        if name not in measured:
            continue
        predicted = human_bytes(beside[name]) if name in beside else "the same" if name == "trainable" else ""
        if name == "saved" and beside:
            predicted = "the same" if same_activations else "not predicted"
        label = part.label if part.drawn else f"  {part.label}"
        rows.append((label, human_bytes(measured[name]), predicted if beside else ""))
    if "peak" in measured:
        rows.append((f"peak ({report['peak_source']})", human_bytes(measured["peak"]), ""))
        rows.append(("  of which since the start", human_bytes(measured["peak_added"]), ""))
    both = [name for name in STATIC if name in measured and name in beside]
    if len(both) == len(STATIC):
        ours, theirs = (sum(values[name] for name in both) for values in (measured, beside))
        rows.append(("weights, gradients and state", human_bytes(ours), human_bytes(theirs)))
    head = ("kept in memory", "measured", ADAMW if beside else "")
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(3)]
    table = [f"  {a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}".rstrip() for a, b, c in [head, *rows]]
    return "\n".join([heading, *table, *(f"  {note}" for note in notes)])
