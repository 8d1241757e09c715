"""lowmem_report.json: what a run was and took, as plain values.

It is written beside its place and renamed, so that a killed run leaves the one before. Reading it, or a
trainer_state.json where there is none, trusts nothing: what is shown in a card was checked to be a name or a number.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from hf_lowmem import checkpoints
from hf_lowmem.runs.history import facts_of_state
from hf_lowmem.runs.timeline import FIGURES

__all__ = ["FORMAT", "REPORT", "BadReport", "predicted_of", "read_report", "write_atomically", "write_report"]

REPORT = "lowmem_report.json"
FORMAT = 3

# Each key of a report, and what it may be.
KEYS: dict[str, tuple[type, ...]] = {
    "format": (int,),
    "run": (str,),
    "trainer": (str, type(None)),
    "config": (str, type(None)),
    "model": (dict,),
    "dataset": (dict,),
    "settings": (dict,),
    "device": (str, type(None)),
    "processes": (int, type(None)),
    "versions": (dict,),
    "head": (dict, type(None)),
    "predicted": (dict, type(None)),
    "trainings": (list,),
    "results": (dict,),
    "history": (list,),
    "card_frame": (str, type(None)),
}
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class BadReport(ValueError):
    """A folder that is no run, or a report that cannot be used; the message names the path and the remedy."""


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write `folder`/lowmem_report.json. Raises OSError."""
    write_atomically(folder / REPORT, json.dumps(report, indent=1, allow_nan=False) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """The old file or the whole new one, whatever happens. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")  # one name: a killed run leaves one such file, not many
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_report(run: str | os.PathLike[str]) -> dict[str, Any]:
    """The report of a run: its folder's lowmem_report.json, or what can be made of a trainer_state.json.

    Raises:
        FileNotFoundError, NotADirectoryError: where `run` is no folder.
        BadReport: for a folder with neither of the two, or with one that is damaged or somebody else's.
    """
    folder = Path(run)
    if not folder.exists():
        raise FileNotFoundError(f"there is no run {folder}: give the output_dir of a training.")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: give the run's folder, the output_dir of a training.")
    if (path := folder / REPORT).exists():
        report = _present(_parse(path))
        check_report(report, path)
        return report
    if (path := _newest_state(folder)) is not None:
        state = _parse(path)
        try:
            report = {"format": FORMAT, **facts_of_state(state, folder, path.parent, _manifest(path.parent))}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise BadReport(
                f"{path} is not the state of a trainer ({type(error).__name__}: {error}). Give the output_dir of a "
                "training."
            ) from error
        check_report(report, path)
        return report
    raise BadReport(
        f"{folder} is not a run: it has neither {REPORT} nor trainer_state.json, and no checkpoint-N with one. Give "
        "the output_dir of a training with a trainer of hf_lowmem, or with MemoryReportCallback."
    )


def predicted_of(plan: Any, source: str) -> dict[str, Any]:
    """Figures of a plan for a report: each part at its own highest, the activations saved for backward, the peak.

    Args:
        plan: `Plan.to_dict()`, or what `hf-lowmem plan --json` prints.
        source: name of the plan in errors.

    Raises:
        BadReport: where it is no plan; the message names `source`.
    """
    try:
        points = [*plan["timeline"], plan["parts"]]
        names = list(dict.fromkeys(name for point in points for name in point))
        parts = {n: max(p.get(n, 0) for p in points) for n in names if n not in ("step", "phase", "module")}
        parts["activations"] = plan["saved_bytes"]
        return {
            "peak_bytes": int(plan["peak_bytes"]),
            "parts": {name: int(size) for name, size in parts.items()},
            "phase": str(plan["phase"]),
            "module": str(plan["module"]),
            "device": str(plan["settings"]["device"]),
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadReport(
            f"{source} is no plan ({type(error).__name__}: {error}). Make one with `hf-lowmem plan ... --json`."
        ) from error


def check_report(report: Any, path: Path) -> None:
    """Raise BadReport unless `report` is one, all through."""
    remedy = f"Delete {path} (a trainer_state.json beside it is read instead), or train again."
    if not isinstance(report, dict) or "format" not in report:
        raise BadReport(f"{path} is not a report of hf_lowmem. {remedy}")
    if report["format"] != FORMAT:
        raise BadReport(
            f"{path} has format {report['format']!r}, and this version of hf_lowmem reads {FORMAT}. Upgrade hf_lowmem."
        )
    if unknown := sorted(set(report) - set(KEYS)):
        raise BadReport(f"{path} has keys that no report has: {', '.join(map(repr, unknown))}. {remedy}")
    for key, kinds in KEYS.items():
        if key not in report:
            raise BadReport(f"{path} is damaged: {key!r} is missing. {remedy}")
        if not isinstance(report[key], kinds):
            raise BadReport(f"{path} is damaged: {key!r} is {report[key]!r}. {remedy}")
    counts = {"model": ("parameters", "trained"), "dataset": ("rows",)}
    numbers = [
        (key, {k: report[key][k] for k in names if report[key].get(k) is not None}) for key, names in counts.items()
    ]
    numbers.append(("results", report["results"]))
    for training in report["trainings"]:
        memory, speed = (training.get(k) for k in ("memory", "speed")) if isinstance(training, dict) else (None, None)
        if not isinstance(memory, dict) or not isinstance(speed, dict):
            raise BadReport(f"{path} is damaged: 'trainings' holds {training!r}. {remedy}")
        sizes = {k: v for k, v in memory.items() if k != "peak_source"}
        steps = {k: training.get(k) for k in ("from_step", "to_step")}
        numbers += [("trainings", sizes), ("trainings", speed), ("trainings", steps)]
        numbers += [("timeline", point) for point in _points(training.get("timeline", []), path, remedy)]
    for row in report["history"]:
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise BadReport(f"{path} is damaged: 'history' holds {row!r}. {remedy}")
        numbers.append(("history", row))
    predicted = report["predicted"]
    if predicted is not None:
        if not isinstance(predicted.get("parts"), dict):
            raise BadReport(f"{path} is damaged: 'predicted' is no plan. {remedy}")
        numbers += [("predicted", predicted["parts"]), ("predicted", {"peak": predicted.get("peak_bytes")})]
    for key, values in numbers:
        for name, value in values.items():
            if not isinstance(value, int | float) and value not in ("nan", "inf", "-inf"):
                raise BadReport(f"{path} is damaged: {name!r} in {key!r} is {value!r}, no number. {remedy}")


def _points(timeline: object, path: Path, remedy: str) -> list[dict[str, object]]:
    """Figures of the points of a measured step."""
    names = {"phase", "module"}
    found: list[dict[str, object]] = []
    for point in timeline if isinstance(timeline, list) else [timeline]:
        whole = isinstance(point, dict) and set(point) == {*names, *FIGURES}
        if not isinstance(point, dict) or not whole or not all(isinstance(point[name], str) for name in names):
            raise BadReport(f"{path} is damaged: 'timeline' holds {point!r}. {remedy}")
        found.append({name: value for name, value in point.items() if name not in names})
    return found


def _parse(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSON's error and a wrong encoding are both the first
        raise BadReport(f"{path} is damaged ({error}). Delete it, or train again.") from error


def _present(report: Any) -> Any:
    """A report as this version writes it: in format 1 the plan was called "foretold", and before 3 there was no word of
    the output head."""
    if not isinstance(report, dict):
        return report
    if report.get("format") == 1 and "foretold" in report:
        report = {"predicted" if key == "foretold" else key: value for key, value in report.items()} | {"format": 2}
    return {"head": None} | report | {"format": FORMAT} if report.get("format") == 2 else report


def _newest_state(folder: Path) -> Path | None:
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))]
    places = [folder, *(path for _, path in sorted(found, reverse=True))]
    return next((place / checkpoints.STATE for place in places if (place / checkpoints.STATE).is_file()), None)


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        return checkpoints.read_manifest(folder) or {}
    except checkpoints.BadCheckpoint:
        return {}
