"""Tables and plot of gpu_once.py, from its record alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from parts.record import Rows
from parts.tables import markdown

GIB, GB = 2**30, 1e9


def number(form: str, factor: float = 1.0) -> Callable[[Any], str]:
    return lambda value: "" if value is None else form.format(value * factor)


SPEED = [
    ("case", "case", str),
    ("way", "way", str),
    ("head", "head", str),
    ("tokens_per_second", "tokens/s", number("{:.0f}")),
    ("seconds", "ms", number("{:.1f}", 1e3)),
    ("host_seconds", "host, ms", number("{:.1f}", 1e3)),
    ("peak", "peak, GiB", number("{:.2f}", 1 / GIB)),
    ("last_loss", "loss", number("{:.3f}")),
]
UPDATE = [
    ("setting", "optimizer", str),
    ("state_bytes_per_parameter", "state B/param", number("{:.2f}")),
    ("moved", "moved, GB", number("{:.2f}", 1 / GB)),
    ("seconds", "ms", number("{:.2f}", 1e3)),
    ("host_seconds", "host, ms", number("{:.2f}", 1e3)),
    ("bandwidth", "GB/s", number("{:.0f}", 1 / GB)),
    ("of_copy_bandwidth", "of copy", number("{:.2f}")),
    ("temporary_bytes", "temporaries, GiB", number("{:.2f}", 1 / GIB)),
]
# (title, steps whose rows it shows, a column that its rows have, the columns: key, head, how a value is written)
TABLES: tuple[tuple[str, tuple[str, ...], str, list[tuple[str, str, Callable[[Any], str]]]], ...] = (
    (
        "Kernels against their references, bit by bit or within their bounds",
        ("check",),
        "kernel",
        [("kernel", "kernel", str), ("case", "compared", str), ("equal", "equal", str)],
    ),
    (
        "Hardware's operations over all values",
        ("proofs",),
        "case",
        [("case", "operation", str), ("values", "values", number("{:,}")), ("differ", "differ", str)],
    ),
    (
        "The device at its best",
        ("roof",),
        "case",
        [
            ("case", "what", str),
            ("bandwidth", "GB/s", number("{:.0f}", 1 / GB)),
            ("flops", "TFLOP/s", number("{:.0f}", 1e-12)),
        ],
    ),
    (
        "Kernels, inputs not in the L2",
        ("kernels",),
        "kernel",
        [
            ("kernel", "kernel", str),
            ("case", "case", str),
            ("seconds", "µs", number("{:.1f}", 1e6)),
            ("seconds_by_operator", "by the operator, µs", number("{:.1f}", 1e6)),
            ("bandwidth", "GB/s", number("{:.0f}", 1 / GB)),
            ("of_copy_bandwidth", "of copy", number("{:.2f}")),
        ],
    ),
    ("One optimizer step, bf16 weights and gradients", ("optimizer", "peers"), "setting", UPDATE),
    ("Forward and backward, Llama-3-8B's layers, bf16", ("layers", "peers"), "way", SPEED),
    ("Whole steps, Llama-3-8B, bf16", ("whole",), "way", SPEED),
    ("Whole steps with products in 8 bits, layers of a Llama-3-8B", ("products",), "way", SPEED),
)


def tables(rows: Rows) -> str:
    """All tables, each for every device that the record has."""
    texts = []
    for title, steps, key, columns in TABLES:
        found = [row for row in rows if row["step"] in steps and key in row]
        for device in dict.fromkeys(row["device"] for row in found):
            shown = [row for row in found if row["device"] == device]
            used = [c for c in columns if any(row.get(c[0]) is not None for row in shown)]
            lines = []
            for row in shown:
                cells = [show(row[name]) if row.get(name) is not None else "" for name, _, show in used]
                if "error" in row:
                    cells[-1] = row["error"]
                lines.append(cells)
            texts.append(f"{title}, on {device}\n\n" + markdown([head for _, head, _ in used], lines))
    return "\n".join(texts)


def draw(rows: Rows, path: Path) -> None:
    """Tokens/s against peak of the whole model, one point a way; nothing where there are no such rows."""
    points = [row for row in rows if row["step"] == "whole" and row.get("peak")]
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
    axes.set_title(f"{points[0]['case']}, on {points[0]['device']}")
    figure.savefig(path, dpi=120)
