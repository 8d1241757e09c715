"""A run's report as it grows: one entry for each training, so that a resumed run tells of the trainings before."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_lowmem.runs.facts import describe, plain
from hf_lowmem.runs.history import history_of, results_of, speed_of
from hf_lowmem.runs.report import FORMAT, BadReport, read_report, write_report

__all__ = ["RunRecord"]

logger = logging.getLogger(__name__)


@dataclass
class RunRecord:
    """Record of the run that is training now.

    Attributes:
        facts: result of `describe`.
        trainings: {"from_step", "to_step", "finished", "memory", "speed", "timeline"} each; the last is the one under
            way.
        results: losses, steps and epochs of the latest training.
        history: {"step", "epoch", "loss" or "eval_loss"} each.
        predicted: result of `predicted_of`.
        head: what was done with the output head's gradient; see hf_lowmem/training/head.py.
        frame: the card that the trainer's own class has made, into which the section is put.
    """

    facts: dict[str, Any]
    trainings: list[dict[str, Any]]
    results: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    predicted: dict[str, Any] | None = None
    head: dict[str, object] | None = None
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
        predicted = None
        step = state.global_step
        if step and Path(args.output_dir).is_dir():
            try:
                report = read_report(args.output_dir)
                earlier = [t for t in report["trainings"] if t["from_step"] < step]
                predicted = report["predicted"]
            except (BadReport, OSError) as error:
                logger.warning("the report begins at step %d: %s", step, error)
        now = {"from_step": step, "to_step": step, "finished": False, "memory": {}, "speed": {}}
        return cls(
            describe(args, model=model, dataset=dataset, trainer=trainer),
            [*earlier, now],
            predicted=predicted,
            tokens_before=before.tokens if before is not None else 0,
            rows_before=len(state.log_history),
        )

    def update(
        self, state: Any, memory: dict[str, Any], timeline: Sequence[Mapping[str, str | int]], *, finished: bool | None
    ) -> None:
        """Update the record. `state`: the trainer's; `memory`: MemoryReportCallback.report, without modules;
        `timeline`: points of a step, see hf_lowmem/runs/timeline.py."""
        rows = state.log_history[self.rows_before :]
        self.tokens = next((row["num_tokens"] for row in reversed(rows) if "num_tokens" in row), self.tokens_before)
        speed = speed_of(rows, self.tokens - self.tokens_before)
        now = {"to_step": state.global_step, "memory": memory, "speed": speed, "timeline": list(timeline)}
        self.trainings[-1] |= now
        if finished is not None:
            self.trainings[-1]["finished"] = finished
        self.results, self.history = results_of(state.log_history), history_of(state.log_history)

    def to_dict(self) -> dict[str, Any]:
        """The report, as lowmem_report.json holds it."""
        return {
            "format": FORMAT,
            **self.facts,
            "head": plain(self.head),
            "predicted": self.predicted,
            # One that came after the end of the run, and trained nothing, tells nothing.
            "trainings": plain([t for t in self.trainings if t["to_step"] > t["from_step"]] or self.trainings[-1:]),
            "results": self.results,
            "history": self.history,
            "card_frame": self.frame,
        }

    def write(self, folder: Path) -> None:
        """Write the report into `folder`. Raises OSError."""
        write_report(folder, self.to_dict())
