"""One picture of several runs: what a training step of each keeps in memory, and its loss.

It needs matplotlib, which only `pip install 'hf-lowmem[demo]'` brings. A Figure of its own, not pyplot: no window, no
global state, whatever backend the user has configured.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_lowmem.runs.parts import DRAWN, PARTS

__all__ = ["MIB", "draw", "draw_memory"]

# Okabe and Ito's colours, as those of the parts.
RUNS = ("#0072B2", "#D55E00", "#CC79A7", "#E69F00", "#009E73", "#56B4E9", "#F0E442", "#000000")
MIB = 2**20


def draw_memory(axes: Axes, runs: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """A stacked bar of parts for each run, and a line at its peak.

    runs: (name, bytes by part, "peak" and "peak_source"), as of MemoryReportCallback.report; what is missing is not
    drawn
    """
    for place, (_, memory) in enumerate(runs):
        bottom = 0.0
        for part in DRAWN:
            size = (memory.get(part) or 0) / MIB
            axes.bar(place, size, bottom=bottom, color=PARTS[part].colour, width=0.62)
            if size > 100:
                axes.text(place, bottom + size / 2, f"{size:,.0f}", ha="center", va="center", fontsize=8)
            bottom += size
        if memory.get("peak") is not None:
            peak = memory["peak"] / MIB
            axes.hlines(peak, place - 0.38, place + 0.38, colors="black", linewidth=1.6)
            axes.text(place, peak, f"peak {peak:,.0f}", ha="center", va="bottom", fontsize=8)
    for part in DRAWN:
        axes.bar(0, 0, color=PARTS[part].colour, label=PARTS[part].drawn)
    sources = sorted({memory["peak_source"] for _, memory in runs if memory.get("peak_source")})
    if sources:
        axes.plot([], [], color="black", linewidth=1.6, label=f"peak ({'; '.join(sources)})")
    highest = max(
        (max(memory.get("peak") or 0, sum(memory.get(part) or 0 for part in DRAWN)) for _, memory in runs), default=0
    )
    axes.set_xticks(range(len(runs)), [name.replace(", ", ",\n") for name, _ in runs], fontsize=8)
    axes.set_ylabel("MiB")
    axes.set_ylim(0, 1.32 * max(highest, MIB) / MIB)
    axes.legend(fontsize=8, ncols=2, loc="upper right")
    axes.set_title("Kept in memory by a training step", fontsize=10)


def draw(runs: Mapping[str, dict[str, Any]], path: Path) -> None:
    """Write `path`, a PNG. runs: name -> report."""
    figure = Figure(figsize=(12.5, 5.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    memory, loss = figure.subplots(1, 2)
    draw_memory(
        memory,
        [(name, report["trainings"][-1]["memory"] if report["trainings"] else {}) for name, report in runs.items()],
    )
    for i, (name, report) in enumerate(runs.items()):
        colour = RUNS[i % len(RUNS)]
        for key, style in (("loss", {"linewidth": 1.2}), ("eval_loss", {"marker": "o", "linestyle": "--"})):
            points = [(row["step"], float(row[key])) for row in report["history"] if key in row]
            if points:
                label = name if key == "loss" else f"{name}, evaluation"
                loss.plot(*zip(*points, strict=True), color=colour, label=label, **style)
    loss.set_xlabel("optimizer steps")
    loss.set_ylabel("loss")
    if loss.lines:
        loss.legend(fontsize=8)
    loss.set_title("Loss, as the trainer logs it", fontsize=10)
    figure.savefig(path, format="png")
