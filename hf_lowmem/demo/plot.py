"""One picture: what each run kept in memory, and what its loss did meanwhile."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_lowmem.demo.runs import Result
from hf_lowmem.runs.parts import PARTS
from hf_lowmem.runs.plot import MIB, draw_memory

RUNS = ("#0072B2", "#D55E00", "#CC79A7", "#E69F00")


def draw(results: Sequence[Result], path: Path, *, title: str) -> None:
    """Write ``path`` (PNG). ``results``: the two SFT runs, then the runs that start from the second one's
    model.

    A Figure of its own, not pyplot: no window, no global state, whatever backend the user has configured.
    """
    figure = Figure(figsize=(12.5, 5.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    memory, loss = figure.subplots(1, 2, width_ratios=(1, 1.15))
    _draw_memory(memory, results)
    _draw_loss(loss, results)
    figure.suptitle(title)
    figure.savefig(path)


def _draw_memory(axes: Axes, results: Sequence[Result]) -> None:
    draw_memory(axes, [(result.name, result.memory) for result in results])
    for place, result in enumerate(results):
        state = result.memory["optimizer"] / MIB
        axes.text(
            place,
            -0.13,
            f"state {state:,.0f} MiB",
            ha="center",
            fontsize=8,
            color=PARTS["optimizer"].colour,
            transform=axes.get_xaxis_transform(),
        )


def _draw_loss(axes: Axes, results: Sequence[Result]) -> None:
    first_stage = results[1].losses[-1][0]
    for place, (result, colour) in enumerate(zip(results, RUNS, strict=True)):
        offset = 0 if place < 2 else first_stage
        if place < 2:  # what ASFT minimises is another quantity, which would not belong on this axis
            steps, losses = zip(*result.losses, strict=True)
            axes.plot(steps, losses, color=colour, linewidth=0.9, alpha=0.45, label=f"{result.name}, train")
        points = result.heldout if place < 2 else [(0, results[1].heldout[-1][1]), *result.heldout]
        steps, losses = zip(*points, strict=True)
        style: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.8}
        if place >= 2:  # the two may lie on each other: the first is wide and pale below the second
            style |= {"linestyle": "--"} if place > 2 else {"linewidth": 5, "alpha": 0.5, "markersize": 9}
        axes.plot([offset + s for s in steps], losses, color=colour, label=f"{result.name}, held-out", **style)
    axes.axvline(first_stage, color="#cccccc", linewidth=0.8, zorder=0)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("loss, nats per token")
    axes.legend(fontsize=8)
    axes.set_title("Loss: SFT, then pairs", fontsize=10)
