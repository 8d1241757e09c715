"""Pictures of runs: what a training step of each keeps in memory, and its loss; and one run's memory over a step.

It needs matplotlib, which only `pip install 'hf-lowmem[demo]'` brings. A Figure of its own, not pyplot: no window, no
global state, whatever backend the user has configured.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hf_lowmem.memory import human_bytes
from hf_lowmem.memory.peak import CUDA_SOURCE
from hf_lowmem.runs.parts import DRAWN, PARTS, STATIC
from hf_lowmem.runs.report import BadReport
from hf_lowmem.runs.timeline import phase_ticks, rest_of

__all__ = ["MIB", "draw", "draw_memory", "draw_step"]

# Okabe and Ito's colours, as those of the parts.
RUNS = ("#0072B2", "#D55E00", "#CC79A7", "#E69F00", "#009E73", "#56B4E9", "#F0E442", "#000000")
MIB = 2**20
UNITS = (("GiB", 2**30), ("MiB", MIB), ("KiB", 2**10))
FAR = 2.5  # times the parts: a line that high would leave them less than a third of the picture


def draw_memory(axes: Axes, runs: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """A stacked bar of parts for each run, and a line at its peak.

    A process's peak has Python and its libraries in it. Where it stands so high above the parts of all runs that they
    could not be told apart, it is written above its bar in place of the line.

    runs: (name, bytes by part, "peak" and "peak_source"), as of MemoryReportCallback.report; what is missing is not
    drawn
    """
    parts = max((sum(memory.get(part) or 0 for part in DRAWN) for _, memory in runs), default=0)
    peaks = [memory.get("peak") or 0 for _, memory in runs]
    sampled = [memory.get("peak_source") != CUDA_SOURCE for _, memory in runs]
    far = [rss and peak > FAR * parts > 0 for peak, rss in zip(peaks, sampled, strict=True)]
    highest = max([parts, *(peak for peak, away in zip(peaks, far, strict=True) if not away), 1])
    unit, scale = next((u, s) for u, s in UNITS if highest >= 4 * s or s == 1024)
    for place, (_, memory) in enumerate(runs):
        bottom = 0.0
        for part in DRAWN:
            size = (memory.get(part) or 0) / scale
            axes.bar(place, size, bottom=bottom, color=PARTS[part].colour, width=0.62)
            if size * scale > 0.06 * highest:
                axes.text(place, bottom + size / 2, f"{size:,.4g}", ha="center", va="center", fontsize=8)
            bottom += size
        if far[place]:
            axes.text(
                place, bottom, f"whole process\n{human_bytes(peaks[place])}", ha="center", va="bottom", fontsize=8
            )
        elif peaks[place]:
            peak = peaks[place] / scale
            axes.hlines(peak, place - 0.38, place + 0.38, colors="black", linewidth=1.6)
            axes.text(place, peak, f"peak {peak:,.4g}", ha="center", va="bottom", fontsize=8)
        if lacking := [PARTS[part].label for part in DRAWN if memory.get(part) is None]:
            text = "not measured:\n" + ",\n".join(lacking)
            axes.annotate(text, (place, bottom), (0, 24), textcoords="offset points", ha="center", fontsize=7)
    for part in DRAWN:
        axes.bar(0, 0, color=PARTS[part].colour, label=PARTS[part].drawn)
    lines = {m["peak_source"] for (_, m), away in zip(runs, far, strict=True) if m.get("peak_source") and not away}
    if lines:
        axes.plot([], [], color="black", linewidth=1.6, label=f"peak ({'; '.join(sorted(lines))})")
    axes.set_xticks(range(len(runs)), [name.replace(", ", ",\n") for name, _ in runs], fontsize=8)
    axes.set_ylabel(unit)
    axes.set_ylim(0, 1.32 * highest / scale)
    axes.legend(fontsize=8, ncols=2, loc="upper right")
    axes.set_title("Kept in memory by a training step (less is better)", fontsize=10)


def draw(runs: Mapping[str, dict[str, Any]], path: Path) -> None:
    """Write `path`, a PNG, SVG or PDF by its name, on white, which reads on dark pages too. runs: name -> report."""
    figure = Figure(figsize=(12.5, 5.2), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    memory, loss = figure.subplots(1, 2)
    draw_memory(
        memory,
        [(name, report["trainings"][-1]["memory"] if report["trainings"] else {}) for name, report in runs.items()],
    )
    for i, (name, report) in enumerate(runs.items()):
        colour = RUNS[i % len(RUNS)]
        if not report["history"]:
            loss.plot([], [], color=colour, label=f"{name}: no loss was logged")
        for key, style in (
            ("loss", {"linewidth": 1.2 if i else 2.6}),
            ("eval_loss", {"marker": "o", "linestyle": "--"}),
        ):
            points = [(row["step"], float(row[key])) for row in report["history"] if key in row]
            if points:
                label = name if key == "loss" else f"{name}, evaluation"
                loss.plot(*zip(*points, strict=True), color=colour, label=label, **style)
    loss.set_xlabel("optimizer steps")
    loss.xaxis.set_major_locator(MaxNLocator(integer=True))
    loss.set_ylabel("loss")
    if loss.lines:
        loss.legend(fontsize=8)
    loss.set_title("Loss, as the trainer logs it (lower is better)", fontsize=10)
    figure.savefig(path)


def draw_step(report: Mapping[str, Any], path: Path) -> None:
    """Write `path`, a PNG, SVG or PDF by its name: what was in use over the step that was measured, part by part.

    Args:
        report: of a run, see hf_lowmem/runs/report.py.

    Raises:
        BadReport: where no step of the run was measured so.
    """
    training = report["trainings"][-1] if report["trainings"] else {}
    points = training.get("timeline") or []
    if not points:
        raise BadReport(
            f"{report['run']}: memory over a step was not measured. A trainer of hf_lowmem, or MemoryReportCallback "
            "with any other, measures it in the first step, if the model is not compiled. `hf-lowmem plan --plot` "
            "draws what is predicted."
        )
    figure = Figure(figsize=(11, 5.2), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    heights = [[int(point[name]) for point in points] for name in STATIC] + [[rest_of(point) for point in points]]
    tops = [sum(column) for column in zip(*heights, strict=True)]
    highest = max(*tops, 1)
    unit, scale = next((u, s) for u, s in UNITS if highest >= 4 * s or s == 1024)
    labels = [*(str(PARTS[name].drawn) for name in STATIC), "all else: activations, temporaries"]
    colours = [str(PARTS[name].colour) for name in (*STATIC, "saved")]
    scaled = [[size / scale for size in row] for row in heights]
    drawn = axes.stackplot(range(len(points)), scaled, labels=labels, colors=colours, step="mid")
    axes.axhline(highest / scale, color="black", linewidth=0.8)
    at = points[tops.index(highest)]
    axes.text(0, highest / scale, f" highest {human_bytes(highest)}, in {at['phase']}", va="bottom", fontsize=8)
    ticks = phase_ticks([point["phase"] for point in points])
    axes.set_xticks([place for place, _ in ticks], [phase for _, phase in ticks], fontsize=8)
    axes.set_xlim(0, max(len(points) - 1, 1))
    axes.set_ylim(0, 1.12 * highest / scale)
    axes.set_ylabel(f"memory, {unit} (less is better)")
    axes.set_xlabel("one training step, layer by layer")
    figure.legend(drawn[::-1], labels[::-1], fontsize=8, loc="outside right upper")
    memory = training["memory"]
    step = f"step {memory['saved_step']}" if "saved_step" in memory else "a step"
    axes.set_title(f"{report['run']}: memory over {step}, measured ({memory['peak_source']})", fontsize=10)
    figure.savefig(path)
