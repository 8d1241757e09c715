"""Choices of `lowmem="auto"` in a run's checkpoints: plain values in the manifest, so that a resume keeps them.

The memory that is free is another at every start, and with other settings a checkpoint could not be resumed. So a
trainer that is made in a run's folder takes what the run's last complete checkpoint says, if it was asked the same: of
the same model, of steps of the same kind and length. Whether it will resume is not known yet.
"""

from pathlib import Path
from typing import Protocol

from hf_lowmem import checkpoints

__all__ = ["CHOSEN", "KEY", "SEARCHED", "asked_of", "check_kept", "kept_choice"]

KEY = "auto"  # in a manifest
CHOSEN = "lowmem=auto"  # among the values of arguments
Values = dict[str, object]
# The fields that a search may set.
SEARCHED = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "lowmem_activations",
    "optim",
    "lowmem_state",
    "lowmem_weights",
    "lowmem_embeddings",
    "lowmem_step_in_backward",
    "max_grad_norm",
)
# Those beside them that say how large a step is, of whatever config has them.
STEP = ("max_length", "packing", "padding_free", "loss_type")


class Asked(Protocol):
    """The fields of arguments that this module reads by their own names."""

    output_dir: str | None
    resume_from_checkpoint: str | None
    lowmem_budget: str | None
    optim: str

    @property
    def lowmem_open(self) -> frozenset[str]: ...


def asked_of(args: Asked, model: str) -> Values:
    """Question of a search: the searched fields that are the user's, the kind and the length of a step, the budget, and
    the model, by a digest of it."""
    given = [name for name in SEARCHED if name not in args.lowmem_open]
    values = {name: getattr(args, name) for name in given} | {"optim": str(getattr(args.optim, "value", args.optim))}
    return {
        "given": {name: values[name] for name in sorted(values)},
        "step": {name: getattr(args, name) for name in STEP if hasattr(args, name)},
        "lowmem_budget": args.lowmem_budget,
        "model": model,
    }


def kept_choice(args: Asked, asked: Values) -> tuple[str, Values] | None:
    """(the checkpoint, the fields that were chosen) of the run that `args` would go on with; None where there is none
    that was asked the same. `asked`: see `asked_of`."""
    folder: str | Path | None = args.resume_from_checkpoint
    if not isinstance(folder, str) or not Path(folder).is_dir():  # True, "auto", or None
        run = Path(args.output_dir or "")
        folder = checkpoints.last_complete(run)[0] if run.is_dir() else None
    stored = None if folder is None else _stored(folder)
    if folder is None or stored is None or stored.get("asked") != asked:
        return None
    chosen = stored.get("chosen")
    if not isinstance(chosen, dict) or not set(chosen) <= set(SEARCHED):
        return None
    return str(folder), chosen


def check_kept(args: object, folder: str | Path) -> None:
    """Raise where a checkpoint was trained with another choice than these arguments have.

    Raises:
        ValueError: naming what differs, and how to go on.
    """
    mine, stored = vars(args).get(CHOSEN), _stored(folder)
    if mine is None or stored is None or stored.get("chosen") == mine["chosen"]:
        return
    before, now = _written(stored.get("chosen")), _written(mine["chosen"])
    raise ValueError(
        f"resume_from_checkpoint={str(folder)!r} cannot be combined with lowmem='auto' here: the checkpoint was "
        f"trained with {before}, and what was chosen now is {now}. Leave lowmem unset and set what the "
        "checkpoint was trained with, or set output_dir to the run's, whose choice is kept."
    )


def _stored(folder: str | Path) -> Values | None:
    try:
        manifest = checkpoints.read_manifest(folder)
    except checkpoints.BadCheckpoint:  # which is said when it is resumed from
        return None
    found = (manifest or {}).get(KEY)
    return found if isinstance(found, dict) else None


def _written(chosen: object) -> str:
    if not isinstance(chosen, dict):
        return "other settings"
    return ", ".join(f"{name}={value!r}" for name, value in chosen.items()) or "the settings as they were"
