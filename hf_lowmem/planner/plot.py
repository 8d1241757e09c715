"""One picture of a plan: what is alive over the step, part by part."""

from pathlib import Path
from textwrap import wrap

from hf_lowmem.memory import human_bytes
from hf_lowmem.planner.parts import PARTS
from hf_lowmem.planner.simulate import Plan
from hf_lowmem.planner.words import assumed
from hf_lowmem.runs.timeline import phase_ticks

__all__ = ["draw"]

# Okabe and Ito's colours, which colour-blind readers can tell apart too.
COLOURS: dict[str, str] = dict(
    zip(
        PARTS,
        ("#999999", "#666666", "#D55E00", "#56B4E9", "#000000", "#CC79A7", "#009E73", "#F0E442", "#0072B2"),
        strict=True,
    )
)
GIB = 2**30


def draw(plan: Plan, path: Path) -> None:
    """Write `path`, a PNG, SVG or PDF by its name: the last simulated step, one point a layer and phase, and its peak.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    last = max(point.step for point in plan.timeline)
    points = [point for point in plan.timeline if point.step == last]
    figure = Figure(figsize=(11, 5.2), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    parts = [name for name in PARTS if any(name in point.parts for point in points)]
    heights = [[point.parts.get(name, 0) / GIB for point in points] for name in parts]
    drawn = axes.stackplot(
        range(len(points)), heights, labels=parts, colors=[COLOURS[name] for name in parts], step="mid"
    )
    axes.axhline(plan.peak_bytes / GIB, color="black", linewidth=0.8)
    axes.text(
        0, plan.peak_bytes / GIB, f" peak {human_bytes(plan.peak_bytes)}, in {plan.phase}", va="bottom", fontsize=8
    )
    ticks = phase_ticks([point.phase for point in points])
    axes.set_xticks([place for place, _ in ticks], [phase for _, phase in ticks], fontsize=8)
    axes.set_xlim(0, max(len(points) - 1, 1))
    axes.set_ylim(0, 1.12 * plan.peak_bytes / GIB)
    axes.set_ylabel("memory, GiB (less is better)")
    axes.set_xlabel("one training step, layer by layer")
    # The highest part on top, as in the picture; beside it, so that no part is covered.
    figure.legend(drawn[::-1], parts[::-1], fontsize=8, loc="outside right upper")
    axes.set_title("\n".join(wrap(f"{plan.settings['model_type']}: {assumed(plan.settings)}", 110)), fontsize=9)
    figure.savefig(path)
