"""A run of the demo, and its result."""

import statistics
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset


@dataclass(frozen=True)
class Run:
    """One training. ``settings`` are fields of the trainer's config, and are reported as they are."""

    name: str
    trainer: str  # a key of TRAINERS
    model: str  # folder or hub name that training starts from
    dataset: Dataset
    settings: dict[str, Any]
    output: str  # folder for the trainer's own files; the model is saved here if `save`
    evaluate_at: tuple[int, ...]  # steps after which the held-out loss is taken; 0 is before training
    score_pairs: tuple[int, ...] = ()  # likewise for held-out pairs
    save: bool = False
    dtype: str = "float32"  # of the weights that training starts with


@dataclass
class Result:
    """Result of a run: numbers and names only, so that it can be written to results.json directly."""

    name: str
    trainer: str
    settings: dict[str, Any]
    losses: list[tuple[int, float]] = field(default_factory=list)  # (step, training loss)
    heldout: list[tuple[int, float]] = field(default_factory=list)  # (step, nats per token)
    pairs: dict[int, dict[str, Any]] = field(default_factory=dict)  # step → PairScore
    step_seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # real tokens in each step's batch, all sequences
    memory: dict[str, Any] = field(default_factory=dict)  # LowMemCallback.report
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """The median over steps: a pause of a shared machine moves a mean, not this.

        The first steps also build the optimizer's state and are measured more closely, so they are left out.
        """
        warm = slice(min(2, len(self.tokens) - 1), None)
        rates = [n / s for n, s in zip(self.tokens[warm], self.step_seconds[warm], strict=True)]
        return statistics.median(rates)

    @property
    def train_loss(self) -> float:
        """Mean over the last quarter of the steps: a single batch of a few hundred tokens is mostly noise."""
        last = self.losses[-max(1, len(self.losses) // 4) :]
        return statistics.fmean(loss for _, loss in last)
