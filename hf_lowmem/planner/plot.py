"""One picture of a plan: what is alive over the step, part by part."""

from pathlib import Path

from hf_lowmem.planner.parts import PARTS
from hf_lowmem.planner.simulate import Plan

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
    """Write `path`, a PNG: the last simulated step, one point a layer and phase; the peak is marked.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    last = max(point.step for point in plan.timeline)
    points = [point for point in plan.timeline if point.step == last]
    figure = Figure(figsize=(10, 4.8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    parts = [name for name in PARTS if any(name in point.parts for point in points)]
    heights = [[point.parts.get(name, 0) / GIB for point in points] for name in parts]
    axes.stackplot(range(len(points)), heights, labels=parts, colors=[COLOURS[name] for name in parts], step="mid")
    axes.axhline(plan.peak_bytes / GIB, color="black", linewidth=0.8)
    axes.text(
        0, plan.peak_bytes / GIB, f"peak {plan.peak_bytes / GIB:.2f} GiB, in {plan.phase}", va="bottom", fontsize=8
    )
    starts = [i for i, point in enumerate(points) if i == 0 or point.phase != points[i - 1].phase]
    axes.set_xticks(starts, [points[i].phase for i in starts], fontsize=8, rotation=30, ha="left")
    axes.set_ylim(0, 1.12 * plan.peak_bytes / GIB)
    axes.set_ylabel("GiB")
    axes.legend(fontsize=8, loc="lower right")
    axes.set_title(
        f"{plan.settings['model_type']}, {plan.settings['tokens']} tokens, {plan.settings['optim']}", fontsize=10
    )
    figure.savefig(path)
