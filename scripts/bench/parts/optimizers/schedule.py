"""Which runs are still to be made, in which order, by how many processes; each finished one is a line of the record.

Tuning comes first: every method with fp32 state, on a seed that is not scored, at the rungs of `settings.LADDER`. Then
all settings at their method's best rate, seed after seed, so that a record that is cut short compares all settings on
fewer seeds rather than fewer settings. Nothing is kept but the record: what is in it is done, and the next run follows
from it, so stopping and starting again changes nothing.
"""

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from parts.optimizers.quality import configuration, key, run
from parts.optimizers.settings import LADDER, MIDDLE_RATE, MOST_RATES, Setting
from parts.record import Row, append_row, read_rows

TUNING_SEED = 100


class Record:
    """A JSONL file of runs, appended to; `common` (commit, versions, device, command) goes into every new line."""

    def __init__(self, path: Path, common: Row | None = None) -> None:
        self.path, self.common = path, common or {}
        self.rows: dict[str, Row] = {row["key"]: row for row in read_rows(path)}

    def add(self, row: Row) -> None:
        row = {"key": key({k: row[k] for k in CONFIGURED})} | row | self.common
        self.rows[row["key"]] = row
        append_row(self.path, row)

    def loss(self, config: dict[str, Any]) -> float | None:
        """Held-out loss of a run; infinite where it diverged, None where it has not been made."""
        row = self.rows.get(key(config))
        if row is None:
            return None
        return float("inf") if row["heldout_loss"] is None else row["heldout_loss"]


CONFIGURED = ("method", "state", "options", "weights", "control", "lr", "seed", "size")


@dataclass(frozen=True)
class Task:
    setting: Setting
    rate: float
    seed: int

    def config(self, size: dict[str, Any]) -> dict[str, Any]:
        return configuration(self.setting, rate=self.rate, seed=self.seed, size=size)


def tuning_losses(record: Record, method: str, size: dict[str, Any]) -> dict[float, float]:
    """Rate → held-out loss of the tuning runs that have been made."""
    found = {rate: record.loss(Task(Setting(method), rate, TUNING_SEED).config(size)) for rate in LADDER}
    return {rate: loss for rate, loss in found.items() if loss is not None}


def rates_to_try(method: str, losses: dict[float, float]) -> list[float]:
    """The rates that tuning still needs; none when the best has worse neighbours on both sides, or enough was tried."""
    middle = LADDER.index(MIDDLE_RATE[method])
    if missing := [rate for rate in LADDER[middle - 1 : middle + 2] if rate not in losses]:
        return missing
    if len(losses) >= MOST_RATES:
        return []
    best = LADDER.index(min(losses, key=lambda rate: losses[rate]))
    around = [LADDER[i] for i in (best - 1, best + 1) if 0 <= i < len(LADDER)]
    return [rate for rate in around if rate not in losses]


def best_rate(record: Record, method: str, size: dict[str, Any]) -> float | None:
    """The tuned rate; None while tuning is not finished."""
    losses = tuning_losses(record, method, size)
    return None if rates_to_try(method, losses) else min(losses, key=lambda rate: losses[rate])


def to_do(record: Record, settings: Sequence[Setting], seeds: Sequence[int], size: dict[str, Any]) -> Iterator[Task]:
    """Runs that can be made now, the next one first."""
    methods = list(dict.fromkeys(setting.method for setting in settings))
    for method in methods:
        for rate in rates_to_try(method, tuning_losses(record, method, size)):
            yield Task(Setting(method), rate, TUNING_SEED)
    rates = {method: best_rate(record, method, size) for method in methods}
    for seed in seeds:
        for setting in settings:
            if (rate := rates[setting.method]) is not None:
                task = Task(setting, rate * setting.rate_factor, seed)
                if record.loss(task.config(size)) is None:
                    yield task


def one_thread() -> None:
    torch.set_num_threads(1)


def make(task: Task, size: dict[str, Any]) -> Row:
    return run(task.setting, rate=task.rate, seed=task.seed, size=size)


def work(
    record: Record,
    settings: Sequence[Setting],
    seeds: Sequence[int],
    size: dict[str, Any],
    *,
    jobs: int,
    budget_seconds: float,
    console: Console,
) -> list[str]:
    """Make every run that is missing, `jobs` at a time; what went wrong, one line a run that raised.

    No run starts after `budget_seconds`; those under way are finished and recorded.
    """
    deadline = time.monotonic() + budget_seconds
    failed: dict[str, str] = {}
    under_way: dict[Future[Row], Task] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=one_thread) as pool:
        while True:
            busy = {key(task.config(size)) for task in under_way.values()} | failed.keys()
            missing = [t for t in to_do(record, settings, seeds, size) if key(t.config(size)) not in busy]
            in_time = time.monotonic() < deadline
            for task in missing[: jobs - len(under_way)] if in_time else []:
                under_way[pool.submit(make, task, size)] = task
            if not under_way:
                if missing:
                    console.print(f"Budget spent; {len(missing)} runs or more are missing. The same command goes on.")
                break
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                task = under_way.pop(future)
                if error := future.exception():
                    failed[key(task.config(size))] = line = f"{task.setting.name}, seed {task.seed}: {error!r}"
                    console.print(f"[red]failed[/red] {line}", highlight=False)
                    continue
                row = future.result()
                record.add(row)
                what = f"{row['setting']}, lr {row['lr']:g}, seed {row['seed']}: {row['heldout_loss']}"
                console.print(f"{what} ({row['seconds']:.0f} s; {len(missing)} to go)", highlight=False)
    return list(failed.values())
