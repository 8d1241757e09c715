"""Tables and the plot, from the records alone."""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from parts.optimizers.schedule import TUNING_SEED, Record, best_rate, tuning_losses
from parts.optimizers.settings import CODECS, PAIRS, STORE_RATE_FACTOR, STORES, Setting
from parts.record import Row
from parts.tables import markdown

# Okabe and Ito's colours and more of their kind; the marker tells the low-rank methods from the others.
STYLES = {
    "adamw": ("#0072B2", "o"),
    "lion": ("#D55E00", "o"),
    "lamb": ("#999999", "o"),
    "soap": ("#009E73", "o"),
    "galore": ("#CC79A7", "s"),
    "fira": ("#E69F00", "s"),
    "apollo": ("#56B4E9", "s"),
    "apollo_mini": ("#000000", "s"),
    "natural_galore": ("#882255", "s"),
    "adam_mini": ("#0072B2", "^"),
    "muon": ("#009E73", "^"),
    "scale": ("#000000", "^"),
}
TICKS = (0.25, 0.5, 1, 2, 4, 8, 16, 32)  # bytes a parameter


class Comparison(NamedTuple):
    """Settings that should end within `limit` per cent of their reference."""

    title: str
    limit: float
    rows: list[tuple[Setting, Setting]]  # (setting, reference)


def comparisons() -> list[Comparison]:
    svd = Setting("galore", extra={"projection": "svd"})
    others = [
        Setting("galore"),
        Setting("galore", extra={"projection": "random"}),
        Setting("galore", extra={"rotate": True}),
    ]
    stores = [Setting("adamw", weights=store, rate_factor=STORE_RATE_FACTOR) for store in STORES]
    coded = [Setting(m, c) for m, codecs in CODECS.items() for c in (*codecs, *(PAIRS if m == "adamw" else ()))]
    return [
        Comparison("Codecs, against the same method's fp32 state", 0.5, [(s, Setting(s.method)) for s in coded]),
        Comparison("Projections (galore, fp32 state), against svd", 0.3, [(s, svd) for s in (svd, *others)]),
        Comparison("bf16 weights (adamw, fp32 state), against fp32 masters", 0.3, [(s, stores[0]) for s in stores]),
        Comparison(
            "Control: the reference again, its first weights changed by 2^-20",
            0.5,
            [(Setting(m, control=True), Setting(m)) for m in ("adamw", "galore")],
        ),
    ]


class Scores:
    """Held-out losses of the scored runs of one size, by setting and seed, at the method's tuned rate."""

    def __init__(self, record: Record, size: dict[str, Any]) -> None:
        self.rows: dict[str, dict[int, Row]] = {}
        self.record, self.size = record, size
        rates = {method: best_rate(record, method, size) for method in CODECS}
        for row in record.rows.values():
            if row["size"] == size and row["seed"] != TUNING_SEED and (rate := rates[row["method"]]) is not None:
                factor = STORE_RATE_FACTOR if row["weights"] != "fp32" else 1.0
                if row["lr"] == float(f"{rate * factor:.6g}"):
                    self.rows.setdefault(row["setting"], {})[row["seed"]] = row

    def losses(self, setting: Setting) -> dict[int, float]:
        """Seed → loss; infinite where the run diverged."""
        found = self.rows.get(setting.name, {})
        return {s: float("inf") if r["heldout_loss"] is None else r["heldout_loss"] for s, r in sorted(found.items())}

    def first(self, setting: Setting) -> Row:
        return next(iter(self.rows[setting.name].values()))


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error, None for one value."""
    if len(values) < 2:
        return statistics.fmean(values), None
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5


def against(losses: dict[int, float], reference: dict[int, float]) -> list[float]:
    """Per cent by which each seed's loss exceeds the reference's at that seed."""
    return [100 * (losses[seed] / reference[seed] - 1) for seed in losses if seed in reference]


def verdict(differences: Sequence[float], limit: float) -> str:
    """Against `limit` per cent: worse by more than that is named; better is never a fault."""
    return "yes" if statistics.fmean(differences) <= limit else "**no**"


def quality_tables(scores: Scores) -> Iterator[str]:
    for comparison in comparisons():
        rows = []
        for setting, reference in comparison.rows:
            losses = scores.losses(setting)
            if not losses:
                continue
            first = scores.first(setting)
            loss = "diverged" if float("inf") in losses.values() else f"{statistics.fmean(losses.values()):.4f}"
            cells = [
                setting.name,
                f"{first['state_bytes_per_parameter']:.3f}",
                f"{first['weight_bytes_per_parameter']:.0f}",
                f"{first['lr']:.3g}",
                str(len(losses)),
                loss,
            ]
            differences = against(losses, scores.losses(reference))
            if setting.name == reference.name or not differences:
                cells += ["", ""]
            elif loss == "diverged":
                cells += ["diverged", "**no**"]
            else:
                mean, error = mean_and_error(differences)
                cells += [
                    f"{mean:+.3f} ± {'?' if error is None else f'{error:.3f}'}",
                    verdict(differences, comparison.limit),
                ]
            rows.append(cells)
        heads = ["setting", "state B/param", "weights B/param", "lr", "seeds", "held-out loss", "difference, %"]
        if rows:
            yield table(comparison.title, [*heads, f"within {comparison.limit} %"], rows)


def long_table(record: Record, size: dict[str, Any]) -> str:
    """The runs of `--part long`, each beside fp32 states at the same seed."""
    runs = {(r["setting"], r["seed"]): r for r in record.rows.values() if r["size"] == size}
    rows = []
    for setting in dict.fromkeys(name for name, _ in runs):
        pairs = [(r, runs.get(("adamw fp32", seed))) for (name, seed), r in runs.items() if name == setting]
        cells = [setting, f"{pairs[0][0]['state_bytes_per_parameter']:.3f}", str(len(pairs))]
        for loss in ("heldout_loss", "train_loss"):
            found = [(r[loss], other and other[loss]) for r, other in pairs]
            if any(ours is None or not theirs for ours, theirs in found):
                cells += ["diverged or not finished", ""]
                continue
            mean, error = mean_and_error([100 * (ours / theirs - 1) for ours, theirs in found])
            cells.append(f"{statistics.fmean(ours for ours, _ in found):.4f}")
            cells.append("" if setting == "adamw fp32" else f"{mean:+.3f} ± {'?' if error is None else f'{error:.3f}'}")
        rows.append(cells)
    heads = ["setting", "state B/param", "seeds", "held-out loss", "difference, %", "training loss", "difference, %"]
    return table(f"{size['steps']:,} steps, against fp32 states", heads, rows)


def tuning_table(record: Record, size: dict[str, Any]) -> str:
    rows = []
    for method in CODECS:
        losses = tuning_losses(record, method, size)
        best = best_rate(record, method, size)
        tried = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in sorted(losses.items()))
        if tried:
            rows.append([method, tried, "not finished" if best is None else f"{best:g}"])
    return table(
        f"Learning rates: held-out loss of each, fp32 state, seed {TUNING_SEED}", ["method", "tried", "taken"], rows
    )


def speed_tables(rows: Sequence[Row]) -> Iterator[str]:
    steps = [r for r in rows if r["measured"] == "step"]
    cells = [
        [r["setting"], r["note"], "", ""]
        if "note" in r
        else [r["setting"], r["package"], f"{r['state_bytes_per_parameter']:.3f}", f"{r['step_ratio']:.2f}"]
        for r in steps
    ]
    yield table(
        f"Step, on {rows[0]['device']}", ["optimizer", "package", "state B/param", "step, × torch fused AdamW"], cells
    )
    cells = [
        [r["setting"], r["note"], ""]
        if "note" in r
        else [r["setting"], f"{1000 * r['refresh_seconds']:.1f}", "" if r["of_svd"] is None else f"{r['of_svd']:.3f}"]
        for r in rows
        if r["measured"] == "refresh"
    ]
    if cells:
        one = next(r for r in rows if r["measured"] == "refresh")
        title = f"Refresh of one basis, {one['shape'][0]}×{one['shape'][1]}, rank {one['rank']}"
        yield table(title, ["projection", "ms", "× svd"], cells)


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f"### {title}\n\n" + markdown(heads, rows)


def draw(scores: Scores, path: Path) -> None:
    """Write `path` (PNG): held-out loss over state bytes a parameter, every method with every codec."""
    figure = Figure(figsize=(9, 6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Axes = figure.subplots()
    for method, (colour, marker) in STYLES.items():
        points = []
        for codec in (*CODECS[method], *(PAIRS if method == "adamw" else ())):
            losses = [loss for loss in scores.losses(Setting(method, codec)).values() if loss != float("inf")]
            if losses:
                at = scores.first(Setting(method, codec))["state_bytes_per_parameter"]
                points.append((at, *mean_and_error(losses), codec))
        if not points:
            continue
        points.sort()
        x, y = [p[0] for p in points], [p[1] for p in points]
        axes.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1, alpha=0.85, label=method)
        for at, loss, _, codec in points:
            axes.annotate(codec, (at, loss), fontsize=6, xytext=(3, 3), textcoords="offset points", color=colour)
    axes.set_xscale("log")
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("optimizer state, bytes a parameter (model of about a million parameters)")
    axes.set_ylabel("held-out loss, nats a token, mean over seeds")
    axes.legend(fontsize=8)
    axes.set_title("Each method with each codec, learning rate tuned for its fp32 state", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
