"""Tables and plot of activations.py, from its record alone."""

import statistics
from collections.abc import Iterator
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from parts.record import Rows, of_part
from parts.tables import markdown


def pivot(rows: Rows, show: dict[str, str]) -> tuple[list[str], list[str], dict[tuple[str, str], str]]:
    """Ways, cases, and the text of each cell."""
    (value, form), *_ = show.items()
    ways = list(dict.fromkeys(row["way"] for row in rows))
    cases = list(dict.fromkeys(row["case"] for row in rows))
    cells = {
        (row["way"], row["case"]): form.format(row[value]) if row[value] is not None else f"not measured: {row['why']}"
        for row in rows
    }
    return ways, cases, cells


def tables(rows: Rows) -> Iterator[str]:
    if found := of_part(rows, "bytes"):
        ways, cases, cells = pivot(found, {"units": "{:.2f}"})
        yield "Kept by one layer, in U = tokens × hidden × 2 bytes\n" + markdown(
            ["", *cases], [[way, *(cells.get((way, case), "") for case in cases)] for way in ways]
        )
    if found := of_part(rows, "error"):
        yield "Relative error of gradients against float64\n" + markdown(
            ["", "worst parameter", "median", "all", "loss equal to HuggingFace's"],
            [
                [
                    row["way"],
                    f"{row['worst']:.2e} ({row['worst_parameter']})",
                    f"{row['median']:.2e}",
                    f"{row['whole']:.2e}",
                    str(row["loss_equal_to_huggingface"]),
                ]
                for row in found
            ],
        )
    if found := of_part(rows, "time"):
        yield f"Time on a CPU, × HuggingFace's ({found[0]['case']})\n" + markdown(
            ["", "ratio"], [[row["way"], f"{row['ratio']:.2f}"] for row in found]
        )
    if found := of_part(rows, "peaks"):
        for row in found:
            row["gib"] = row["peak"] / 2**30
        ways, cases, cells = pivot(found, {"gib": "{:.2f}"})
        yield "Peak of weights, gradients and activations, GiB\n" + markdown(
            ["", *cases], [[way, *(cells.get((way, case), "") for case in cases)] for way in ways]
        )
    if found := of_part(rows, "loss"):
        yield "Held-out loss after 200 steps\n" + markdown(
            ["", "loss", "difference to HuggingFace, %", "seeds"], [loss_cells(found, way) for way in ways_of(found)]
        )


def ways_of(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["way"] for row in rows))


def loss_cells(rows: Rows, way: str) -> list[str]:
    by = {(row["way"], row["seed"]): row["heldout_loss"] for row in rows}
    seeds = sorted(seed for w, seed in by if w == way and ("HuggingFace", seed) in by)
    mean = statistics.fmean(by[way, seed] for seed in seeds)
    off = statistics.fmean(100 * (by[way, s] / by["HuggingFace", s] - 1) for s in seeds)
    return [way, f"{mean:.4f}", f"{off:+.3f}", str(len(seeds))]


def draw(rows: Rows, path: Path) -> None:
    """Bytes a layer by way, for the Llama shapes."""
    shapes = ("Llama-2-7B", "Llama-3-8B")
    found = [row for row in of_part(rows, "bytes") if row["units"] is not None and row["case"] in shapes]
    if not found:
        return
    ways, cases, _ = pivot(found, {"units": "{:.2f}"})
    units = {(row["way"], row["case"]): row["units"] for row in found}
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, case in enumerate(cases):
        places = [j + 0.4 * (i - 0.5) for j in range(len(ways))]
        bars = axes.barh(places, [units.get((w, case), 0.0) for w in ways], height=0.38, label=case)
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    axes.set_yticks(range(len(ways)), ways)
    axes.invert_yaxis()
    axes.set_xlabel("kept by one layer for backward, in bf16 tensors of tokens × hidden")
    axes.legend()
    figure.savefig(path, dpi=120)
