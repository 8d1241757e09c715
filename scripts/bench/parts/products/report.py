"""Tables of products in 8 bits, from the record."""

import statistics
from collections.abc import Iterator

from parts.record import Rows, of_part


def tables(rows: Rows) -> Iterator[str]:
    """Markdown: errors, cost, loss; of parts that have rows."""
    for table in (errors(of_part(rows, "error")), costs(of_part(rows, "cost")), losses(of_part(rows, "loss"))):
        if table:
            yield table


def errors(rows: Rows) -> str:
    """Relative errors in percent: y / dX / dW."""
    ways, cases = (list(dict.fromkeys(row[key] for row in rows)) for key in ("way", "case"))
    if not rows:
        return ""
    found = {(r["case"], r["way"]): " / ".join(f"{100 * r[n]:.2f}" for n in ("y", "dx", "dw")) for r in rows}
    lines = [f"| {' | '.join(['y / dX / dW, % of float64', *ways])} |", "|---" * (len(ways) + 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join([c, *(found[c, w] for w in ways)])} |" for c in cases)])


def costs(rows: Rows) -> str:
    if not rows:
        return ""
    lines = [
        "| tokens | linears, times as fast | step, times as fast | casts, of the linears' time |",
        "|---|---|---|---|",
    ]
    lines += [f"| {r['tokens']:,} | {r['linears']:.2f} | {r['step']:.2f} | {r['casts']:.0%} |" for r in rows]
    return "\n".join(lines)


def losses(rows: Rows) -> str:
    """Held-out loss against bf16 of the same seed, in percent: mean and range over seeds."""
    if not rows:
        return ""
    lines = [
        "| run | products | held-out loss | against bf16, %: mean | lowest, highest | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for case in dict.fromkeys(r["case"] for r in rows):
        of = {(r["way"], r["seed"]): r["heldout_loss"] for r in rows if r["case"] == case}
        for way in dict.fromkeys(r["way"] for r in rows):
            seeds = [s for w, s in of if w == way and ("bf16", s) in of]
            if not seeds:
                continue
            gaps = [100 * (of[way, s] / of["bf16", s] - 1) for s in seeds]
            ends = "" if way == "bf16" else f"{min(gaps):+.2f}, {max(gaps):+.2f}"
            mean = "" if way == "bf16" else f"{statistics.fmean(gaps):+.2f}"
            loss = statistics.fmean(of[way, s] for s in seeds)
            lines.append(f"| {case} | `{way}` | {loss:.4f} | {mean} | {ends} | {len(seeds)} |")
    return "\n".join(lines)
