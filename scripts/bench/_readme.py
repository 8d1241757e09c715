"""README's tables, made from the records. tests/test_readme.py holds README to them."""

import statistics
from typing import Any

from hf_lowmem.specs import TIERS
from parts.optimizers import quality as _quality
from parts.optimizers import report as _report
from parts.optimizers import schedule as _schedule
from parts.optimizers.settings import CODECS, STORE_RATE_FACTOR, STORES, Setting
from parts.record import RECORDS, Rows

COLUMNS = ("bf16", "int8", "int8_softsign", "fp8", "fp8_expand", "8bit", "int8,fp8_expand", "int4")


def scores() -> _report.Scores:
    return _report.Scores(_schedule.Record(RECORDS / "optimizers.jsonl"), _quality.SIZE)


def one(rows: Rows, **wanted: Any) -> dict[str, Any]:
    (found,) = [row for row in rows if all(row.get(k) == v for k, v in wanted.items())]
    return found


def activation_rows(rows: Rows) -> list[str]:
    """A line a tier: bytes of two shapes, gradient error, loss, peak."""
    lines = []
    for way in ("HuggingFace", "checkpointing", *TIERS):
        kept = [f"{one(rows, part='bytes', case=case, way=way)['units']:.2f}" for case in ("Llama-2-7B", "Llama-3-8B")]
        peak = one(rows, part="peaks", case="16,384 tokens, gradients freed in backward", way=way)["peak"] / 2**30
        error = loss = ""
        if way != "checkpointing":
            errors = one(rows, part="error", way=way)
            error = f"{100 * errors['whole']:.2g} % / {100 * errors['worst']:.2g} %"
            ours, theirs = (
                {r["seed"]: r["heldout_loss"] for r in rows if r["part"] == "loss" and r["way"] == w}
                for w in (way, "HuggingFace")
            )
            off = statistics.fmean(100 * (ours[seed] / theirs[seed] - 1) for seed in (0, 1, 2))
            loss = f"{statistics.fmean(ours.values()):.3f} ({off:+.2f} %)"
        name = way if way in ("HuggingFace", "checkpointing") else f"`{way}`"
        lines.append(f"| {name} | {kept[0]} | {kept[1]} | {error} | {loss} | {peak:.1f} GiB |")
    return lines


def difference(scored: _report.Scores, setting: Setting, reference: Setting) -> tuple[float, float]:
    """Per cent by which the loss exceeds the reference's, and its standard error, over three seeds."""
    found = _report.against(scored.losses(setting), scored.losses(reference))
    assert len(found) == 3, setting
    mean, error = _report.mean_and_error(found)
    assert error is not None
    return mean, error


def quality_table(scored: _report.Scores) -> list[str]:
    """A line a method, a column a codec."""
    lines = ["| | " + " | ".join(f"`{c}`" for c in COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for method in CODECS:
        cells = []
        for codec in COLUMNS:
            setting = Setting(method, codec)
            shown = scored.losses(setting)
            cells.append("{:+.2f} ± {:.2f}".format(*difference(scored, setting, Setting(method))) if shown else "")
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    return lines


def quality_figures(scored: _report.Scores) -> dict[str, str]:
    """Single figures of README's text."""
    masters, *others = [Setting("adamw", weights=store, rate_factor=STORE_RATE_FACTOR) for store in STORES]
    stores = {f"STORE_{s.weights} ": "{:+.2f} ± {:.2f} ".format(*difference(scored, s, masters)) for s in others}
    subspace = difference(scored, Setting("galore"), Setting("galore", extra={"projection": "svd"}))
    control = difference(scored, Setting("adamw", control=True), Setting("adamw"))
    return stores | {"SUBSPACE": "{:+.2f} ± {:.2f}".format(*subspace), "CONTROL": f"{abs(control[0]):.2f}"}


def speed_rows(rows: Rows) -> list[str]:
    """A line an optimizer that keeps AdamW's moments in fewer bytes, ours beside others'."""
    names = (
        "torch AdamW fused",
        "bitsandbytes AdamW8bit",
        "torchao AdamW8bit",
        "torchao AdamWFp8",
        "torchao AdamW4bit",
    )
    ours = ("adamw int8", "adamw 8bit", "adamw fp8", "adamw int4", "apollo_mini 8bit")
    lines = []
    for name in (*names, *ours):
        row = one(rows, setting=name)
        shown = f"hf_lowmem `{name}`" if name in ours else name
        lines.append(f"| {shown} | {row['state_bytes_per_parameter']:.2f} | {row['step_ratio']:.1f} |")
    return lines
