"""Tables of products in 8 bits, from the record: lines of Markdown."""

import statistics
from collections.abc import Iterator

from parts.record import Rows, of_part


def tables(rows: Rows) -> Iterator[str]:
    """Errors, cost and losses, of parts that have rows."""
    for part, table in (("error", errors), ("cost", costs), ("loss", losses), ("finetune", losses), ("long", drift)):
        if found := of_part(rows, part):
            yield "\n".join(table(found))


def errors(rows: Rows) -> list[str]:
    """Relative errors in percent: y / dX / dW."""
    ways, cases = (list(dict.fromkeys(row[key] for row in rows)) for key in ("way", "case"))
    found = {(r["case"], r["way"]): " / ".join(f"{100 * r[n]:.2f}" for n in ("y", "dx", "dw")) for r in rows}
    lines = [f"| y / dX / dW, % | {' | '.join(ways)} |", "|---" * (len(ways) + 1) + "|"]
    return [*lines, *(f"| {' | '.join([c, *(found[c, w] for w in ways)])} |" for c in cases)]


def costs(rows: Rows) -> list[str]:
    lines = ["| tokens | linears, times as fast | step, times as fast | casts, of the linears' time |"]
    lines += ["|---|---|---|---|"]
    return lines + [f"| {r['tokens']:,} | {r['linears']:.2f} | {r['step']:.2f} | {r['casts']:.0%} |" for r in rows]


def losses(rows: Rows) -> list[str]:
    """Held-out loss against bf16 of the same seed, in percent: mean and range over seeds."""
    lines = ["| run | products | held-out loss | against bf16, %: mean | lowest, highest | seeds |"]
    lines += ["|---|---|---|---|---|---|"]
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
    return lines


def drift(rows: Rows) -> list[str]:
    """Loss of the long run after each half, and against bf16 then, in percent: held out, and of the last twentieth."""
    by = {row["way"]: row for row in rows}
    head = "| run | products | held-out loss after half, all | against bf16, %: after half, all |"
    lines = [f"{head} training loss against bf16, %: up to half, all |"]
    lines += ["|---|---|---|---|---|"]
    for way, row in by.items():
        held, trained = row["heldout_loss"], row["train_loss"]
        against = ["", ""]
        if way != "bf16":
            base = by["bf16"]
            half = len(trained) // 2
            pairs = [(held, base["heldout_loss"], (0, 1)), (trained, base["train_loss"], (half - 1, -1))]
            against = [
                ", ".join(f"{100 * (ours[i] / theirs[i] - 1):+.2f}" for i in ends) for ours, theirs, ends in pairs
            ]
        lines.append(f"| {row['case']} | `{way}` | {held[0]:.4f}, {held[1]:.4f} | {against[0]} | {against[1]} |")
    return lines
