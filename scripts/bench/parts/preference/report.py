"""Tables and plots of preference.py, from its record alone."""

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from parts.record import Row, Rows, of_part
from parts.tables import markdown

RULES: dict[str, tuple[str, Callable[[Row], float]]] = {
    "exact": ("exact match", lambda row: row["validation"]["exact"]),
    "margin": ("accuracy of the margin", lambda row: row["validation"]["margin_accuracy"]),
}


def tables(rows: Rows) -> Iterator[str]:
    yield from memory_tables(of_part(rows, "memory"))
    yield from time_tables(of_part(rows, "time"), of_part(rows, "sharing"))
    yield from collapse_tables(of_part(rows, "collapse"))
    yield from cosmosqa_tables(of_part(rows, "cosmosqa"))


def spread(values: list[float], form: str = ".2f") -> str:
    """Mean, and the values themselves: three seeds are too few for more."""
    return f"{statistics.fmean(values):{form}} ({', '.join(f'{v:{form}}' for v in values)})"


def ways_of(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["way"] for row in rows))


def memory_tables(rows: Rows) -> Iterator[str]:
    vocabularies = list(dict.fromkeys(row["vocabulary"] for row in rows))
    for freed in (False, True):
        found = {(r["way"], r["vocabulary"]): r for r in rows if r["freed"] is freed}
        if not found:
            continue
        size = rows[0]["size"]
        lines = []
        for way in ways_of(rows):
            cells = []
            for vocabulary in vocabularies:
                row = found[way, vocabulary]
                fixed = row["parts"]["weights"] + row["parts"]["reference"]
                cells.append(f"{row['peak'] / 2**30:.2f} ({(row['peak'] - fixed) / 2**30:.2f})")
            lines.append([way, *cells])
        yield (
            f"Peak of forward and backward, GiB, and without the weights of models; gradients "
            f"{'freed in backward' if freed else 'kept'}; Llama-3-8B's shape, {size['layers']} layers, {size['pairs']} "
            f"pairs of prompts of {size['prompt']} and answers of {size['answer']} tokens, bf16, checkpointed\n"
            + markdown(["", *(f"vocabulary {v:,}" for v in vocabularies)], lines)
        )


def time_tables(rows: Rows, sharing: Rows) -> Iterator[str]:
    if rows:
        vocabularies = list(dict.fromkeys(row["vocabulary"] for row in rows))
        ratios = {(row["way"], row["vocabulary"]): f"{row['ratio']:.2f}" for row in rows}
        yield f"Time of a step on {rows[0]['device']}, × TRL's ORPO\n" + markdown(
            ["", *(f"vocabulary {v:,}" for v in vocabularies)],
            [[way, *(ratios[way, v] for v in vocabularies)] for way in ways_of(rows)],
        )
    for row in sharing:
        size = row["size"]
        yield f"Prompts shared, of {size['prompt']} tokens before answers of {size['answer']}\n" + markdown(
            ["", "plain", "shared", "ratio"],
            [
                ["tokens", str(row["tokens_plain"]), str(row["tokens_shared"]), f"{row['tokens_ratio']:.3f}"],
                ["seconds", f"{row['seconds_plain']:.3f}", f"{row['seconds_shared']:.3f}", f"{row['time_ratio']:.3f}"],
            ],
        )


def chosen_rate(rows: Rows, method: str, rule: str) -> float:
    """The rate that validation prefers, as a mean over the seeds; of equals the smaller."""
    _, value = RULES[rule]
    by_rate: dict[float, list[float]] = {}
    for row in rows:
        if row["method"] == method:
            by_rate.setdefault(row["rate"], []).append(value(row))
    return max(sorted(by_rate), key=lambda rate: statistics.fmean(by_rate[rate]))


def methods_of(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows if row["method"] != "start"))


def collapse_scores(rows: Rows, method: str, rule: str, measure: str) -> list[float]:
    """Test values of the seeds at the rate that `rule` chooses; of the start, where method is "start"."""
    rate = None if method == "start" else chosen_rate(rows, method, rule)
    found = [row for row in rows if row["method"] == method and row["rate"] == rate]
    return [row["test"][measure] for row in sorted(found, key=lambda row: row["seed"])]


def collapse_tables(rows: Rows) -> Iterator[str]:
    if not rows:
        return
    measures = ("exact", "margin_accuracy", "pair_accuracy", "chosen", "rejected")
    heads = ["", "rate", "exact match", "margin accuracy", "pair accuracy", "log p chosen", "log p rejected"]
    for rule, (name, _) in RULES.items():
        lines = []
        for method in ("start", *methods_of(rows)):
            rate = "" if method == "start" else f"{chosen_rate(rows, method, rule):g}"
            cells = [spread(collapse_scores(rows, method, rule, m)) for m in measures]
            if method == "start":
                cells[measures.index("margin_accuracy")] = ""  # it is measured from there
            lines.append([method, rate, *cells])
        yield f"Addition, test sums, learning rate chosen by {name} on validation; mean (seeds)\n" + markdown(
            heads, lines
        )
    rates = sorted({row["rate"] for row in rows if row["rate"] is not None})
    lines = []
    for method in methods_of(rows):
        found = {rate: [r for r in rows if r["method"] == method and r["rate"] == rate] for rate in rates}
        cells = [
            f"{statistics.fmean(r['test']['exact'] for r in f):.2f} at "
            f"{100 * statistics.fmean(r['test']['margin_accuracy'] for r in f):.0f} %"
            for f in found.values()
            if f
        ]
        lines.append([method, *cells])
    yield "Addition, every rate: exact match at the accuracy of the margin, test sums, mean of seeds\n" + markdown(
        ["", *(f"{rate:g}" for rate in rates)], lines
    )


def cosmosqa_tables(rows: Rows) -> Iterator[str]:
    scored = [row for row in rows if row["stage"] == "score"]
    if not scored:
        return
    heads = ["", "rate", "seeds", "pair accuracy", "margin accuracy", "log p right", "log p wrong"]
    heads += ["exact", "overlap right", "overlap wrong", "ended"]
    measures = ("pair_accuracy", "margin_accuracy", "chosen", "rejected")
    measures += ("exact", "overlap_right", "overlap_wrong", "ended")
    lines = []
    for method in ("start", *methods_of(scored)):
        found = [row for row in scored if row["method"] == method]
        rate = found[0]["rate"]
        cells = [spread([row[m] for row in found]) for m in measures]
        if method == "start":
            cells[measures.index("margin_accuracy")] = ""
        lines.append([method, "" if rate is None else f"{rate:g}", str(len(found)), *cells])
    size = scored[0]["size"]
    yield (
        f"CosmosQA, {size['test']} test questions ({size['generated']} answered), {size['steps'] * size['batch']} "
        "pairs of training; mean (seeds)\n" + markdown(heads, lines)
    )


def draw(rows: Rows, record: Path) -> None:
    """A plot a part that has rows, beside the record."""
    for part, picture in (("memory", draw_memory), ("collapse", draw_collapse), ("cosmosqa", draw_cosmosqa)):
        if found := of_part(rows, part):
            picture(found, record.with_name(f"{record.stem}_{part}.png"))


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_memory(rows: Rows, path: Path) -> None:
    """Bytes by part over vocabularies, gradients freed as they come."""
    found = [row for row in rows if row["freed"]]
    vocabularies, ways = list(dict.fromkeys(row["vocabulary"] for row in found)), ways_of(found)
    figure = new_figure(8, 1.2 + 0.28 * len(ways) * len(vocabularies))
    axes = figure.subplots(len(vocabularies), 1, sharex=True, squeeze=False)[:, 0]
    for axis, vocabulary in zip(axes, vocabularies, strict=True):
        by_way = {row["way"]: row for row in found if row["vocabulary"] == vocabulary}
        left = [0.0] * len(ways)
        for part in by_way[ways[0]]["parts"]:
            width = [by_way[way]["parts"][part] / 2**30 for way in ways]
            axis.barh(range(len(ways)), width, left=left, height=0.7, label=part)
            left = [a + b for a, b in zip(left, width, strict=True)]
        axis.set_yticks(range(len(ways)), ways, fontsize=8)
        axis.invert_yaxis()
        axis.set_title(f"vocabulary {vocabulary:,}", fontsize=9)
    axes[0].legend(fontsize=8)
    axes[-1].set_xlabel("GiB at the peak of forward and backward, gradients freed in backward")
    figure.savefig(path, dpi=120)


def draw_collapse(rows: Rows, path: Path) -> None:
    """Every run: exact match against the accuracy of the margin; and the two log-probabilities."""
    figure = new_figure(10, 4.5)
    left, right = figure.subplots(1, 2)
    for i, method in enumerate(methods_of(rows)):
        found = [row["test"] for row in rows if row["method"] == method]
        style: dict[str, Any] = {"label": method, "color": f"C{i}", "s": 22, "alpha": 0.8}
        left.scatter([t["margin_accuracy"] for t in found], [t["exact"] for t in found], **style)
        right.scatter([t["rejected"] for t in found], [t["chosen"] for t in found], **style)
    starts = [row["test"] for row in rows if row["method"] == "start"]
    left.axhline(statistics.fmean(t["exact"] for t in starts), color="black", lw=1, ls="--", label="start")
    style = {"color": "black", "marker": "x", "label": "start"}
    right.scatter([t["rejected"] for t in starts], [t["chosen"] for t in starts], **style)
    left.set(xlabel="accuracy of the margin", ylabel="exact match", ylim=(-0.03, 1.03))
    right.set(xlabel="log-probability a token, wrong answers", ylabel="log-probability a token, right answers")
    right.legend(fontsize=8)
    figure.suptitle("Addition, test sums: every method, rate and seed", fontsize=10)
    figure.savefig(path, dpi=120)


def draw_cosmosqa(rows: Rows, path: Path) -> None:
    """The seeds of each method: pair accuracy, overlap with the right answer, log-probabilities."""
    scored = [row for row in rows if row["stage"] == "score"]
    names = ["start", *methods_of(scored)]
    figure = new_figure(11, 3.8)
    titles = {
        "pair_accuracy": "pair accuracy",
        "overlap_right": "overlap of words with the right answer",
        "chosen": "log-probability a token, right answers",
    }
    for axis, (measure, title) in zip(figure.subplots(1, len(titles)), titles.items(), strict=True):
        for i, name in enumerate(names):
            values = [row[measure] for row in scored if row["method"] == name]
            axis.scatter([i] * len(values), values, color=f"C{i}")
            axis.hlines(statistics.fmean(values), i - 0.3, i + 0.3, color=f"C{i}")
        axis.set_xticks(range(len(names)), names, rotation=45)
        axis.set_title(title, fontsize=9)
    figure.savefig(path, dpi=120)
