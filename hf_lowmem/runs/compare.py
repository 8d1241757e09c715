"""Several runs beside each other: the settings in which they differ, memory, loss, speed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_lowmem.runs.card import MISSING, number, safe, size
from hf_lowmem.runs.parts import PARTS

__all__ = ["compare", "names_of", "table"]

SPEEDS = {"steps_per_second": "steps/s", "samples_per_second": "samples/s", "tokens_per_second": "tokens/s"}
RESULTS = {
    "steps": "steps",
    "train_loss": "train loss, mean",
    "last_loss": "train loss, last",
    "eval_loss": "eval loss, last",
    "best_eval_loss": "eval loss, best",
}
NOT_SET = "default"
FOREIGN = (
    "no report of hf_lowmem, so weights and optimizer state are those of its checkpoint's files, and the rest is not "
    "known. `MemoryReportCallback().add_to(trainer)` measures it in any Trainer."
)
IDENTITY = ("trainer", "device", "processes", "model", "parameters", "dataset", "rows of the dataset")
VERSION = "version of "


def names_of(runs: Sequence[Path]) -> list[str]:
    """Short names that tell the runs apart: the folder's, or as much of the path as is needed."""
    parts = [path.resolve().parts for path in runs]
    names = [path[-1] for path in parts]
    for depth in range(2, max(map(len, parts)) + 1):
        count = Counter(names)
        names = ["/".join(path[-depth:]) if count[name] > 1 else name for name, path in zip(names, parts, strict=True)]
    return names


def compare(runs: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Settings that differ and figures that were measured, as plain values; None where one was not measured.

    Args:
        runs: name → report.
    """
    found: dict[str, Any] = {"runs": {}, "differing": {}}
    for kind in (lambda report: report["settings"], _identity):
        facts = {name: kind(report) for name, report in runs.items()}
        for key in sorted({key for values in facts.values() for key in values}):
            values = {name: values.get(key) for name, values in facts.items()}
            # A setting that is not there has its default, unless none was recorded; any other fact is unknown.
            known = [v for name, v in values.items() if v is not None or (kind is not _identity and facts[name])]
            if any(value != known[0] for value in known):
                found["differing"][key] = values
    for name, report in runs.items():
        last = report["trainings"][-1] if report["trainings"] else {"memory": {}, "speed": {}, "finished": None}
        found["runs"][name] = {
            "memory": {part: last["memory"].get(part) for part in (*PARTS, "peak", "peak_added", "peak_source")},
            "predicted_peak": (report["predicted"] or {}).get("peak_bytes"),
            "results": {key: report["results"].get(key) for key in RESULTS},
            "speed": {key: last["speed"].get(key) for key in SPEEDS},
            "trainings": len(report["trainings"]),
            "finished": last["finished"],
            "settings_recorded": bool(report["settings"]),
        }
    return found


def _identity(report: dict[str, Any]) -> dict[str, Any]:
    """Facts of a run that are no settings and yet explain a difference: trainer, device, model, data, versions."""
    model, data = report["model"], report["dataset"]
    values = (report["trainer"], report["device"], report["processes"], model.get("name"), model.get("parameters"))
    facts = dict(zip(IDENTITY, (*values, data.get("name"), data.get("rows")), strict=True))
    facts |= {VERSION + name: version for name, version in report["versions"].items()}
    return {key: value for key, value in facts.items() if value is not None}


def table(compared: dict[str, Any]) -> str:
    """A Markdown table, a column for each run."""
    runs: dict[str, Any] = compared["runs"]
    rows: list[list[str]] = []
    for key, values in compared["differing"].items():
        setting = key not in IDENTITY and not key.startswith(VERSION)
        unset = {n: NOT_SET if setting and run["settings_recorded"] else "not recorded" for n, run in runs.items()}
        label = f"`{safe(key)}`" if setting else safe(key)
        rows.append([label, *(unset[name] if v is None else safe(v) for name, v in values.items())])
    for name, part in PARTS.items():
        rows.append([part.label, *(size(run["memory"][name]) for run in runs.values())])
    sources = sorted({run["memory"]["peak_source"] for run in runs.values() if run["memory"]["peak_source"]})
    for source in sources or [None]:  # never in one row: they are not to be compared with each other
        mine = [run["memory"] if run["memory"]["peak_source"] == source else {} for run in runs.values()]
        rows.append([f"peak ({safe(source)})" if source else "peak", *(size(memory.get("peak")) for memory in mine)])
        if source and source.startswith("process"):
            rows.append(["of which since the start", *(size(memory.get("peak_added")) for memory in mine)])
    if any(run["predicted_peak"] is not None for run in runs.values()):
        rows.append(
            ["peak, predicted"]
            + [
                "not asked for" if run["predicted_peak"] is None else size(run["predicted_peak"])
                for run in runs.values()
            ]
        )
    for kind, names in (("results", RESULTS), ("speed", SPEEDS)):
        rows += [[label, *(number(run[kind][key]) for run in runs.values())] for key, label in names.items()]
    shown = [row for row in rows if any(cell != MISSING for cell in row[1:])]
    head = [["", *map(safe, runs)], ["---", *("---:" for _ in runs)]]
    lines = ["| " + " | ".join(row) + " |" for row in [*head, *shown]]
    foreign = [safe(name) for name, run in runs.items() if not run["settings_recorded"]]
    return "\n".join([*lines, *(["", f"{', '.join(foreign)}: {FOREIGN}"] if foreign else [])])
