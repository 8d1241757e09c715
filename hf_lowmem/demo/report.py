"""The tables at the end, for a terminal."""

import sys
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from hf_lowmem.demo.runs import Result
from hf_lowmem.demo.score import mean_and_error
from hf_lowmem.runs.parts import DRAWN


def training_rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One row a run. ``relative_speed`` is against the first run."""
    reference = results[0].tokens_per_second
    return [
        {
            "run": result.name,
            **{part: result.memory[part] for part in DRAWN},
            "peak": result.memory["peak"],
            "peak_source": result.memory["peak_source"],
            "train_loss": result.train_loss,
            "heldout_loss": result.heldout[-1][1],
            "tokens_per_second": result.tokens_per_second,
            "relative_speed": result.tokens_per_second / reference,
        }
        for result in results
    ]


def stage_rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Base, SFT, and what each second stage made of SFT; pairs are scored from the SFT model on."""
    _, sft, *second = results
    stages = [("before any training", sft, 0), (sft.name, sft, sft.losses[-1][0])]
    stages += [(result.name, result, result.losses[-1][0]) for result in second]
    return [
        {"model": name, "heldout_loss": dict(result.heldout)[step], "pairs": result.pairs.get(step)}
        for name, result, step in stages
    ]


def against_control(results: Sequence[Result]) -> dict[str, float]:
    """ASFT's margin less the control's, pair by pair: far sharper than the two means beside each other,
    since what makes one pair harder than another is the same for both."""
    asft, control = (next(reversed(result.pairs.values()))["margins"] for result in results[2:])
    mean, error = mean_and_error([a - c for a, c in zip(asft, control, strict=True)])
    return {"margin": mean, "margin_error": error}


def screen() -> Console:
    """Where tables go: a terminal at its width, elsewhere the width that they need."""
    return Console() if sys.stdout.isatty() else Console(width=110)


def show(results: Sequence[Result]) -> None:
    """Print both tables."""
    console = screen()
    rows, stages = training_rows(results), stage_rows(results)
    pairs = next(len(stage["pairs"]["margins"]) for stage in stages if stage["pairs"])
    difference = against_control(results)
    console.print("\n[bold]What each run kept in memory (MiB), and what came out[/bold]")
    console.print(training_table(rows))
    console.print(
        f"peak: {rows[0]['peak_source']}. Losses in nats per token; the train loss is the mean of the last "
        "quarter of the steps, and ASFT's is another quantity than SFT's. tokens/s: against the first run; the second "
        "stage's batches have other shapes.\n",
        highlight=False,
    )
    console.print(f"[bold]On plays held out: loss, and telling true next lines from others ({pairs} pairs)[/bold]")
    console.print(_stage_table(stages))
    console.print(
        "± one standard error. margin: log-probability of true lines less that of others, nats per token.\n"
        f"ASFT's margin less that of as many steps of SFT, pair by pair: {difference['margin']:+.4f} ± "
        f"{difference['margin_error']:.4f}.\n",
        highlight=False,
    )


def training_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("run", no_wrap=True)
    headings = ("weights", "gradients", "optimizer\nstate", "saved\nactivations", "peak")
    for heading in (*headings, "train\nloss", "held-out\nloss", "relative\ntokens/s"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["run"],
            *(f"{row[part] / 2**20:,.0f}" for part in (*DRAWN, "peak")),
            f"{row['train_loss']:.3f}",
            f"{row['heldout_loss']:.3f}",
            f"{row['relative_speed']:.2f}",
        )
    return table


def _stage_table(stages: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("model", no_wrap=True)
    for heading in ("held-out loss", "pair accuracy", "margin"):
        table.add_column(heading, justify="right")
    for stage in stages:
        score = stage["pairs"]
        table.add_row(
            stage["model"],
            f"{stage['heldout_loss']:.3f}",
            f"{score['accuracy']:.1%} ± {score['accuracy_error']:.1%}" if score else "",
            f"{score['margin']:+.3f} ± {score['margin_error']:.3f}" if score else "",
        )
    return table
