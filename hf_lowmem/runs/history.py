"""Losses, speed and memory of a run, from the rows that a trainer has logged."""

import re
from pathlib import Path
from typing import Any

from hf_lowmem.runs.facts import plain
from hf_lowmem.runs.foreign import memory_of_files, model_of_files, versions_of_card

__all__ = ["POINTS", "SKIPPED", "facts_of_state", "history_of", "results_of", "speed_of"]

# In a row of metrics, how many steps have left out updates; see hf_lowmem/runs/skips.py.
SKIPPED = "lowmem/skipped"

# Points of a loss curve that a report keeps: enough for a picture, and a file of tens of kilobytes after any number of
# steps. trainer_state.json has them all.
POINTS = 500
_IN_GIB = re.compile(r"lowmem/(\w+)_gib")


def speed_of(rows: list[dict[str, Any]], tokens: float = 0) -> dict[str, Any]:
    """Steps, samples and tokens a second over a whole training, its evaluations and saves included, as the Trainer's
    last row says; nothing before there is one."""
    last = next((row for row in reversed(rows) if "train_runtime" in row), {})
    names = {"train_runtime": "seconds"} | {f"train_{k}": k for k in ("steps_per_second", "samples_per_second")}
    found = {ours: last[theirs] for theirs, ours in names.items() if theirs in last}
    if "train_tokens_per_second" in last:
        found["tokens_per_second"] = last["train_tokens_per_second"]
    elif tokens > 0 and found.get("seconds"):
        found |= {"tokens": tokens, "tokens_per_second": tokens / found["seconds"]}
    return plain(found)


def results_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Losses, steps and epochs."""
    found: dict[str, Any] = {}
    for row in rows:
        for theirs, ours in (("loss", "last_loss"), ("train_loss", "train_loss"), ("eval_loss", "eval_loss")):
            if theirs in row:
                found[ours] = row[theirs]
        if SKIPPED in row:
            found["skipped_steps"] = row[SKIPPED]
        found |= {"steps": row.get("step"), "epochs": row.get("epoch")}
    evals = [row["eval_loss"] for row in rows if "eval_loss" in row]
    if evals:
        found["best_eval_loss"] = min(evals)
    return {k: v for k, v in plain(found).items() if v is not None}


def history_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Loss curves, thinned out evenly; each one's last point stays."""
    kept = []
    for name in ("loss", "eval_loss"):
        points = [{"step": row["step"], "epoch": row.get("epoch", 0), name: row[name]} for row in rows if name in row]
        every = -(-len(points) // POINTS) or 1
        kept += points[::-1][::every][::-1]
    return plain(sorted(kept, key=lambda point: point["step"]))


def facts_of_state(state: Any, folder: Path, checkpoint: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """A report, but for its format, from a trainer_state.json: memory, losses and speed where they were logged; nothing
    of settings.

    folder: the run's. checkpoint: that of the state's file, whose files say the sizes of weights and optimizer state.
    manifest: the checkpoint's, if there is one. Raises KeyError, TypeError and the like for what is no
    trainer's state.
    """
    rows = state["log_history"]
    memory: dict[str, Any] = {}
    for row in rows:
        for key, size in row.items():
            if (found := _IN_GIB.fullmatch(key)) is not None and isinstance(size, int | float):
                memory[found[1]] = round(size * 2**30)
            elif key.startswith("lowmem/") and key != SKIPPED:  # an older version's, in bytes
                memory[key.removeprefix("lowmem/")] = size
    for kind, source in (("cuda", "cuda allocator"), ("rss", "process RSS, sampled")):
        if f"peak_{kind}" in memory:
            peak, added = memory.pop(f"peak_{kind}"), memory.pop(f"peak_{kind}_added")
            memory |= {"peak": peak, "peak_added": added, "peak_source": source}
    finished = any("train_runtime" in row for row in rows)
    training = {"from_step": 0, "to_step": int(state["global_step"]), "finished": finished}
    versions = manifest.get("versions")
    memory = memory_of_files(checkpoint) | memory
    return {
        "run": folder.resolve().name,
        "trainer": None,
        "config": None,
        "model": model_of_files(checkpoint),
        "dataset": {},
        "settings": {},
        "device": None,
        "processes": manifest.get("processes"),
        "head": None,
        "versions": versions if isinstance(versions, dict) else versions_of_card(folder),
        "predicted": None,
        "trainings": [{**training, "memory": plain(memory), "speed": speed_of(rows)}],
        "results": results_of(rows),
        "history": history_of(rows),
        "card_frame": None,
    }
