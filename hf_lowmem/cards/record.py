"""A run's report as it grows: one entry for each training, so that a resumed run tells of the trainings before."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_lowmem.cards.facts import describe, plain
from hf_lowmem.cards.report import FORMAT, BadReport, read_report, write_report

__all__ = ["RunRecord", "report_of_state"]

logger = logging.getLogger(__name__)

# In a row of metrics, how many steps have left out updates; see hf_lowmem/skips.py.
SKIPPED = "lowmem/skipped"

# Points of a loss curve that a report keeps: enough for a picture, and a file of tens of kilobytes after any number of
# steps. trainer_state.json has them all.
POINTS = 500


@dataclass
class RunRecord:
    """What is known of the run that is training now.

    facts:     as of `describe`
    trainings: {"from_step", "to_step", "finished", "memory", "speed"}; the last is the one under way
    results:   of the latest: losses, steps, epochs
    history:   {"step", "epoch", "loss" or "eval_loss"}
    foretold:  as of `foretold_of`
    frame:     the card that the trainer's own class has made, to put the section into
    """

    facts: dict[str, Any]
    trainings: list[dict[str, Any]]
    results: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    foretold: dict[str, Any] | None = None
    frame: str | None = None
    tokens_before: float = 0  # TRL counts on from one `train()` of a trainer to the next
    tokens: float = 0
    rows_before: int = 0

    @classmethod
    def begin(
        cls, args: Any, state: Any, *, model: Any, dataset: Any, trainer: str | None, before: "RunRecord | None"
    ) -> "RunRecord":
        """A training starts: at step 0 a new run, at a later one the run goes on whose report is in `output_dir`.

        before: the record of the same trainer's training before this one
        """
        earlier: list[dict[str, Any]] = []
        foretold = None
        step = state.global_step
        if step and Path(args.output_dir).is_dir():
            try:
                report = read_report(args.output_dir)
                earlier = [t for t in report["trainings"] if t["from_step"] < step]
                foretold = report["foretold"]
            except (BadReport, OSError) as error:
                logger.warning("the report begins at step %d: %s", step, error)
        now = {"from_step": step, "to_step": step, "finished": False, "memory": {}, "speed": {}}
        return cls(
            describe(args, model=model, dataset=dataset, trainer=trainer),
            [*earlier, now],
            foretold=foretold,
            tokens_before=before.tokens if before is not None else 0,
            rows_before=len(state.log_history),
        )

    def update(self, state: Any, memory: dict[str, Any], *, finished: bool | None) -> None:
        """What is known by now. `state`: the trainer's; `memory`: MemoryReportCallback.report, without modules."""
        rows = state.log_history[self.rows_before :]
        self.tokens = next((row["num_tokens"] for row in reversed(rows) if "num_tokens" in row), self.tokens_before)
        speed = speed_of(rows, self.tokens - self.tokens_before)
        self.trainings[-1] |= {"to_step": state.global_step, "memory": memory, "speed": speed}
        if finished is not None:
            self.trainings[-1]["finished"] = finished
        self.results, self.history = results_of(state.log_history), history_of(state.log_history)

    def to_dict(self) -> dict[str, Any]:
        """The report, as lowmem_report.json holds it."""
        return {
            "format": FORMAT,
            **self.facts,
            "foretold": self.foretold,
            # One that came after the end of the run, and trained nothing, tells nothing.
            "trainings": plain([t for t in self.trainings if t["to_step"] > t["from_step"]] or self.trainings[-1:]),
            "results": self.results,
            "history": self.history,
            "card_frame": self.frame,
        }

    def write(self, folder: Path) -> None:
        """Into `folder`. Raises OSError."""
        write_report(folder, self.to_dict())


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


def report_of_state(state: Any, folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """A report from a trainer_state.json: memory, losses and speed where they were logged; nothing of settings.

    manifest: that of the checkpoint it lies in, if there is one. Raises KeyError, TypeError and the like for what is no
    trainer's state.
    """
    rows = state["log_history"]
    memory: dict[str, Any] = {}
    for row in rows:
        kept = {name: v for name, v in row.items() if name.startswith("lowmem/") and name != SKIPPED}
        memory |= {name.removeprefix("lowmem/"): v for name, v in kept.items()}
    for kind, source in (("cuda", "cuda allocator"), ("rss", "process RSS, sampled")):
        if f"peak_{kind}" in memory:
            peak, added = memory.pop(f"peak_{kind}"), memory.pop(f"peak_{kind}_added")
            memory |= {"peak": peak, "peak_added": added, "peak_source": source}
    finished = any("train_runtime" in row for row in rows)
    training = {"from_step": 0, "to_step": int(state["global_step"]), "finished": finished}
    versions = manifest.get("versions")
    return {
        "format": FORMAT,
        "run": folder.resolve().name,
        "trainer": None,
        "config": None,
        "model": {},
        "dataset": {},
        "settings": {},
        "device": None,
        "processes": manifest.get("processes"),
        "versions": versions if isinstance(versions, dict) else {},
        "foretold": None,
        "trainings": [{**training, "memory": plain(memory), "speed": speed_of(rows)}],
        "results": results_of(rows),
        "history": history_of(rows),
        "card_frame": None,
    }
