"""README.md of a run: model_cards/template.md, filled with what a report knows.

TRL's trainers have a card of their own, with a quick start and citations, and PEFT adds to it; people add what only
they know. None of that is ours to lose. So only one section is ours, between two comments, and only it is written
again. The whole template is used where there is no card at all.

A README.md that no trainer has made is never touched: a card that a trainer has made says `generated_from_trainer`
among its tags, or has our section.
"""

import hashlib
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load, metadata_save
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

import hf_lowmem
from hf_lowmem.memory import human_bytes
from hf_lowmem.runs.parts import PARTS
from hf_lowmem.runs.report import write_atomically

logger = logging.getLogger(__name__)

__all__ = [
    "CARD",
    "GENERATED",
    "MISSING",
    "UsersCard",
    "mend_metadata",
    "own_frame",
    "refresh",
    "render",
    "template_path",
    "whole_card",
]

CARD = "README.md"
MISSING = "not measured"
GENERATED = "generated_from_trainer"

# In the template as they are; in a card, the first carries a digest of the text around the section.
BEGIN, END = "<!-- hf_lowmem: section -->", "<!-- hf_lowmem: end of section -->"
_SECTION = re.compile(r"<!-- hf_lowmem: section(?: \S+ \S.*?)? -->\n.*?" + re.escape(END) + r"\n*", re.DOTALL)
_DIGEST = re.compile(r"<!-- hf_lowmem: section ([0-9a-f]{16}) ")


class UsersCard(ValueError):
    """A README.md that no trainer has made, and that is therefore left as it is."""


def template_path(name: str = "template.md") -> Path:
    """A template of model_cards, in a clone at its own place and in a wheel inside the package.

    Raises:
        FileNotFoundError: neither is there.
    """
    package = Path(hf_lowmem.__file__).parent
    places = (package.parent / "model_cards" / name, package / "model_cards" / name)
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"no model card template at {' or '.join(map(str, places))}: reinstall hf-lowmem")


def refresh(folder: Path, report: dict[str, Any], make_frame: Callable[[], None] | None = None) -> str:
    """Write the run's card, `folder`/README.md; the card without what the section says, for the report to keep.

    make_frame: writes a README.md into `folder` as the trainer's own class does, tags, citations and all. It is called
    where there is no card, or one of ours that nobody has changed since.

    Raises:
        UsersCard: where the README.md there is somebody's own.
        OSError: where it cannot be read or written.
    """
    path = folder / CARD
    text = path.read_text(encoding="utf-8") if path.exists() else None
    if text is not None and not _SECTION.search(text) and not _is_generated(text):
        raise UsersCard(f"{path} was not made by a trainer, so it is left as it is.")
    if make_frame is not None and (text is None or _is_untouched(text)):
        make_frame()
        text = path.read_text(encoding="utf-8")
    elif make_frame is not None:
        logger.info("%s may have been edited: only the section of hf_lowmem is written", path)
    new = whole_card(report) if text is None else _with_section(text, render(report))
    write_atomically(path, new)
    return _with_section(new, "")


def whole_card(report: dict[str, Any]) -> str:
    """The card of a run whose folder has none: in the frame that the report kept, or the template's own."""
    frame = report["card_frame"]
    return _with_section(frame if frame is not None else own_frame(report), render(report))


def own_frame(report: dict[str, Any]) -> str:
    """The template's own text around the section."""
    return _SECTION.sub("", _filled(report))


def render(report: dict[str, Any]) -> str:
    """The section, from its heading to its end, without the comments around it."""
    (section,) = _SECTION.findall(_filled(report))
    return section.removeprefix(BEGIN).strip().removesuffix(END).strip()


def _with_section(text: str, section: str) -> str:
    frame = _SECTION.sub("", text)
    marked = f"<!-- hf_lowmem: section {_digest(frame)} is written again with each save; edit outside of it -->"
    whole = f"{marked}\n{section}\n{END}\n"
    if (found := _SECTION.search(text)) is not None:  # where it was
        return text[: found.start()] + whole + ("\n" if text[found.end() :] else "") + text[found.end() :]
    before, heading, after = text.partition("\n## Citations\n")
    return f"{before.rstrip()}\n\n{whole}" + (f"{heading}{after}" if heading else "")


def _is_untouched(text: str) -> bool:
    """Whether all around the section is known to be as it was when the section was written."""
    marked = _DIGEST.search(text)
    return marked is not None and marked[1] == _digest(_SECTION.sub("", text))


def _digest(frame: str) -> str:
    return hashlib.sha256("".join(frame.split()).encode()).hexdigest()[:16]


def _is_generated(text: str) -> bool:
    parts = text.split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return False
    try:
        header = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return False
    tags = header.get("tags") if isinstance(header, dict) else None
    return isinstance(tags, list) and GENERATED in tags


def _filled(report: dict[str, Any]) -> str:
    model = report["model"]
    data = ModelCardData(
        base_model=None if model.get("folder") else _on_hub(model.get("name")),
        datasets=_on_hub(report["dataset"].get("name")),
        library_name="peft" if model.get("adapters") else "transformers",
        model_name=report["run"],
        tags=[GENERATED, "hf-lowmem"],
        ignore_metadata_errors=True,
    )
    card = ModelCard.from_template(data, template_path=str(template_path()), **_values(report))
    return str(card)


def mend_metadata(folder: Path) -> None:
    """Take a base model out of a card's metadata that is none on the hub: PEFT writes a folder there, or nothing at
    all, and the hub refuses the card. On rank 0."""
    path = folder / CARD
    data = metadata_load(path) if path.is_file() else None
    base = (data or {}).get("base_model")
    if data is None or not isinstance(base, str) or (_on_hub(base) is not None and not Path(base).exists()):
        return
    del data["base_model"]
    tags = data.get("tags")
    if isinstance(tags, list):
        data["tags"] = [tag for tag in tags if not str(tag).startswith("base_model:")]
    metadata_save(path, data)


def _on_hub(name: str | None) -> str | None:
    """The name of a model or a data set, if one on the hub can have it; the hub refuses a card with another."""
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return None
    return name


def _values(report: dict[str, Any]) -> dict[str, Any]:
    trainings = report["trainings"]
    model, data = report["model"], report["dataset"]
    memory, source = _memory(report)
    where = f"the {data['name']} dataset" if data.get("name") else "a dataset whose name is not recorded"
    rows = f" ({data['rows']:,} rows)" if data.get("rows") is not None else ""
    # Where nothing was logged, there is no entry at all.
    last = trainings[-1] if trainings else {"from_step": 0, "to_step": 0, "finished": True, "memory": {}, "speed": {}}
    kind = f"`{safe(report['trainer'])}`" if report["trainer"] else "a trainer whose name is not recorded"
    count = f", {model['trained']:,} of its {model['parameters']:,} parameters trained" if "trained" in model else ""
    stored = f", stored as {safe(model['dtype'])}" if model.get("dtype") else ""
    where, machines = safe(where), _count(report["processes"])
    unfinished = "" if last["finished"] else f" This is its state at step {last['to_step']}; training has not ended."
    fine = f"A fine-tuned version of {safe(model['name'])}" if model.get("name") else "A model"
    return {
        "title": safe(report["run"]),
        "intro": f"{fine}, trained on {where} with hf_lowmem.",
        "how": f"Trained with {kind} on {where}{rows}{count}{stored}, on {machines}.{unfinished}",
        "settings": [{"name": safe(k), "value": safe(v)} for k, v in sorted(report["settings"].items())],
        "plan": report["predicted"] is not None,
        "memory": memory,
        "memory_notes": _memory_notes(report, source),
        "results": _results(report, last["speed"]),
        "speed_notes": "Losses are as the trainer logs them. Speed is over the whole training, evaluations and saves "
        "included" + (", and since it was resumed." if len(trainings) > 1 else "."),
        "trainings": [_training(t) for t in trainings] if len(trainings) > 1 else [],
        "device": safe(report["device"] or "Device not recorded"),
        "versions": ", ".join(f"{safe(k)} {safe(v)}" for k, v in report["versions"].items()) + "."
        if report["versions"]
        else "Versions: not recorded.",
    }


def _memory(report: dict[str, Any]) -> tuple[list[dict[str, str]], str | None]:
    measured = report["trainings"][-1]["memory"] if report["trainings"] else {}
    predicted = report["predicted"] or {}
    source = measured.get("peak_source")
    parts = predicted.get("parts") or {}
    rows = [(part.label, parts.get(part.planned), measured.get(name)) for name, part in PARTS.items()]
    rows.append((f"peak ({source})" if source else "peak", predicted.get("peak_bytes"), measured.get("peak")))
    if "peak_added" in measured:
        rows.append(("of which since the start", None, measured["peak_added"]))
    return [
        {"part": safe(label), "predicted": "" if plan is None else human_bytes(plan), "measured": size(taken)}
        for label, plan, taken in rows
    ], source


def _memory_notes(report: dict[str, Any], source: str | None) -> str:
    notes = ["Of one process; of FSDP, its shard."]
    if step := (report["trainings"][-1]["memory"] if report["trainings"] else {}).get("saved_step"):
        notes.append(f"What is saved for backward was measured in step {step}.")
    if source is not None and source.startswith("process"):
        notes.append("The peak is of the whole process, Python and its libraries included.")
    if report["predicted"] is not None:
        notes.append(
            f"Predicted by `hf-lowmem plan` for {safe(report['predicted'].get('device') or 'a GPU')}, for full rows of "
            "the longest length; its peak is of tensors alone, each part's figure is that part's own highest."
        )
    return " ".join(notes)


def _results(report: dict[str, Any], speed: dict[str, Any]) -> list[dict[str, str]]:
    results = report["results"]
    rows = [
        ("train loss, mean of the training", results.get("train_loss")),
        ("train loss, last logged", results.get("last_loss")),
        ("eval loss, last", results.get("eval_loss")),
        ("eval loss, best", results.get("best_eval_loss")),
        ("steps", results.get("steps")),
        *([("steps that left out updates", results["skipped_steps"])] if results.get("skipped_steps") else []),
        ("epochs", results.get("epochs")),
        ("steps/s", speed.get("steps_per_second")),
        ("samples/s", speed.get("samples_per_second")),
        ("tokens/s", speed.get("tokens_per_second")),
    ]
    return [{"name": name, "value": number(value)} for name, value in rows]


def _training(training: dict[str, Any]) -> dict[str, Any]:
    memory = training["memory"]
    return {
        "from_step": training["from_step"],
        "to_step": training["to_step"],
        "finished": "yes" if training["finished"] else "no",
        "saved": size(memory.get("saved")),
        "peak": size(memory.get("peak")),
        "speed": number(training["speed"].get("steps_per_second")),
    }


def size(value: Any) -> str:
    """Bytes, readable."""
    return MISSING if value is None else human_bytes(value)


def number(value: Any) -> str:
    """Four digits of what is no whole number."""
    if value is None:
        return MISSING
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _count(processes: int | None) -> str:
    if processes is None:
        return "a number of processes that is not recorded"
    return "one process" if processes == 1 else f"{processes} processes"


def safe(value: Any) -> str:
    """Text for a cell of a table: one line, without `|`, and without a comment that could end ours."""
    return re.sub(r"\s+", " ", str(value)).replace("|", "\\|").replace("<", "&lt;")
