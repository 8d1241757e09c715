"""A trainer's report and card: who measures, and when README.md is written.

TRL's trainers write a card with each checkpoint, and transformers' own only where a model is pushed to the hub; both
through `create_model_card`, which LowMemTrainerMixin extends. At the end of a training there is always a card. Cards
are in `output_dir`, not in its checkpoints, which are complete when their manifest has been written.

No card is worth a training: whatever goes wrong here is a warning.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Trainer

from hf_lowmem.preference.losses import PREFERENCE_LOSSES
from hf_lowmem.runs.callback import MemoryReportCallback
from hf_lowmem.runs.card import CARD, UsersCard, own_frame, refresh
from hf_lowmem.runs.mended import mended
from hf_lowmem.runs.report import write_atomically

__all__ = ["reporter_of", "write_card", "write_last_card"]

logger = logging.getLogger(__name__)

TAG = "hf-lowmem"


def reporter_of(trainer: Any) -> MemoryReportCallback | None:
    """The trainer's MemoryReportCallback, in front of its loggers; one is added where a report is wanted and none is
    there. None where neither is so: with arguments of the plain class, and where `reports` is False."""
    callbacks = trainer.callback_handler.callbacks
    found = [callback for callback in callbacks if isinstance(callback, MemoryReportCallback)]
    users = [callback for callback in found if not isinstance(callback, _Automatic)]
    for callback in found if users or not trainer.reports else []:
        if isinstance(callback, _Automatic):  # the user's measures the same
            trainer.remove_callback(callback)
    if users:
        found = users
    elif not trainer.reports or not hasattr(trainer.args, "lowmem_optim_spec"):
        return None
    elif not found:
        found = [_Automatic()]
    for callback in reversed(found):
        callback.add_to(trainer)
    found[0].predicted = trainer.predicted or found[0].predicted
    return found[0]


class _Automatic(MemoryReportCallback):
    """The one that nobody asked for: it leaves logs as they are, and does not keep a training waiting."""

    tells = False

    def __init__(self) -> None:
        super().__init__(trim=False)


def write_card(trainer: Any, parents: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """README.md in `output_dir`: the parents' card, with our section and tag in it. On rank 0."""
    if not trainer.is_world_process_zero():
        return
    reporter = _measuring(trainer)
    if reporter is None:
        parents(*args, **kwargs)
        return
    tags = kwargs.get("tags") or []
    asked = getattr(trainer.args, "loss_type", None) or []
    losses = [asked] if isinstance(asked, str) else list(asked)
    ours = [name for name in losses if name in PREFERENCE_LOSSES]
    kwargs["tags"] = sorted({TAG, *ours, *([tags] if isinstance(tags, str) else tags)})
    path = Path(trainer.args.output_dir) / CARD
    facts = reporter.record.facts["model"] if reporter.record is not None else {}

    def make_frame() -> None:
        parents(*args, **kwargs)
        text = path.read_text(encoding="utf-8")
        write_atomically(path, mended(text, model=facts.get("name"), losses=losses))

    _write(trainer, reporter, make_frame)


def write_last_card(trainer: Any, parents: Callable[..., None]) -> None:
    """Write the card at the end of a training.

    transformers' own card asks the hub for the base model's licence, which nobody has asked for here: its trainers get
    the template's.
    """
    reporter = _measuring(trainer)
    if reporter is None or reporter.record is None or not trainer.is_world_process_zero():
        return
    record = reporter.record
    if getattr(parents, "__func__", None) is Trainer.create_model_card:
        path = Path(trainer.args.output_dir) / CARD
        _write(trainer, reporter, lambda: write_atomically(path, own_frame(record.to_dict())))
        return
    hub_id = getattr(trainer.args, "hub_model_id", None)
    name = (hub_id or Path(trainer.args.output_dir).resolve().name).split("/")[-1]
    write_card(trainer, parents, model_name=name)


def _measuring(trainer: Any) -> MemoryReportCallback | None:
    callbacks = trainer.callback_handler.callbacks
    return next((c for c in callbacks if isinstance(c, MemoryReportCallback) and c.record is not None), None)


def _write(trainer: Any, reporter: MemoryReportCallback, make_frame: Callable[[], None]) -> None:
    record = reporter.record
    assert record is not None
    folder = Path(trainer.args.output_dir)
    try:
        reporter.note(trainer.state)
        record.frame = refresh(folder, record.to_dict(), make_frame)
        record.write(folder)
    except UsersCard as error:  # the report is there
        logger.warning("%s `hf-lowmem card %s --output FILE` writes this run's card elsewhere.", error, folder)
    except Exception as error:
        logger.warning("no card of the run in %s: %s: %s", folder, type(error).__name__, error)
