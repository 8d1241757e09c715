"""Tables and plot of gpu.py, from its record alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from parts.record import Rows, of_part
from parts.tables import markdown

GIB, GB = 2**30, 1e9


def number(form: str, factor: float = 1.0) -> Callable[[Any], str]:
    return lambda value: "" if value is None else form.format(value * factor)


# part → (title, the columns: key, head, how a value is written)
COLUMNS: dict[str, tuple[str, list[tuple[str, str, Callable[[Any], str]]]]] = {
    "kernels": (
        "Kernels: equal to the reference, and speed against a device copy",
        [
            ("kernel", "kernel", str),
            ("case", "case", str),
            ("equal", "equal", str),
            ("seconds", "µs", number("{:.1f}", 1e6)),
            ("bandwidth", "GB/s", number("{:.0f}", 1 / GB)),
            ("of_copy_bandwidth", "of copy", number("{:.2f}")),
            ("speed_up", "× reference", number("{:.1f}")),
        ],
    ),
    "optimizer": (
        "One optimizer step, bf16 weights and gradients",
        [
            ("setting", "optimizer", str),
            ("state_bytes_per_parameter", "state B/param", number("{:.2f}")),
            ("moved", "moved, GB", number("{:.2f}", 1 / GB)),
            ("seconds", "ms", number("{:.2f}", 1e3)),
            ("ratio_to_torch_fused", "× torch fused AdamW", number("{:.2f}")),
            ("of_copy_bandwidth", "of copy", number("{:.2f}")),
            ("temporary_bytes", "temporaries, GiB", number("{:.2f}", 1 / GIB)),
        ],
    ),
    "training": (
        "Training, Llama-3-8B shape, bf16",
        [
            ("case", "case", str),
            ("way", "way", str),
            ("head", "head", str),
            ("tokens_per_second", "tokens/s", number("{:.0f}")),
            ("speed_to_first_way", "× first", number("{:.2f}")),
            ("peak", "peak, GiB", number("{:.2f}", 1 / GIB)),
            ("kept_bytes", "kept by the layer, MiB", number("{:.1f}", 2**-20)),
            ("last_loss", "loss", number("{:.3f}")),
        ],
    ),
    "plan": (
        "Predicted and measured peaks",
        [
            ("setting", "setting", str),
            ("foretold", "predicted, GiB", number("{:.3f}", 1 / GIB)),
            ("measured", "measured, GiB", number("{:.3f}", 1 / GIB)),
            ("difference", "difference, %", number("{:+.2f}", 100)),
        ],
    ),
}


def tables(rows: Rows) -> str:
    texts = []
    for part, (title, columns) in COLUMNS.items():
        found = of_part(rows, part)
        for device in dict.fromkeys(row["device"] for row in found):
            shown = [row for row in found if row["device"] == device]
            used = [c for c in columns if any(row.get(c[0]) is not None for row in shown)]
            lines = []
            for row in shown:
                cells = [show(row[key]) if row.get(key) is not None else "" for key, _, show in used]
                if "note" in row:
                    cells[-1] = row["note"]
                lines.append(cells)
            texts.append(f"{title}, on {device}\n" + markdown([head for _, head, _ in used], lines))
    return "\n".join(texts)


def draw(rows: Rows, path: Path) -> None:
    """Tokens/s against peak of the whole model, one point a way; nothing where there are no such rows."""
    points = [r for r in rows if r["part"] == "training" and r["case"].startswith("whole") and r.get("peak")]
    if not points:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for row in points:
        axes.plot(row["peak"] / GIB, row["tokens_per_second"], "o")
        axes.annotate(row["way"], (row["peak"] / GIB, row["tokens_per_second"]), fontsize=7)
    axes.set_xlabel("peak, GiB")
    axes.set_ylabel("tokens a second")
    axes.set_title(f"{points[0]['case']}, {points[0]['tokens']:,} tokens, on {points[0]['device']}")
    figure.savefig(path, dpi=120)
