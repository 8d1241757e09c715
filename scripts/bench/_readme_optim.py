"""Tables of hf_lowmem/optim/README.md, made from the records: codecs, their errors, quality, long runs, speed."""

from collections.abc import Callable
from typing import Any

from hf_lowmem import codecs
from parts.optimizers import report, schedule
from parts.optimizers.quality import LONG
from parts.optimizers.settings import BASES, CODECS, OF_BASES, STORE_RATE_FACTOR, STORES, Setting
from parts.record import RECORDS, Rows, read_rows
from parts.small_llama import SIZE

NOT_YET = "not measured yet"
COLUMNS = ("bf16", "int8", "int8_softsign", "fp8", "fp8_expand", "8bit", "int8,fp8_expand", "int4")
STATES = ("torch-adamw", "adamw-int8", "adamw-fp8_expand", "apollo-r256-int8", "apollo_mini-int8")
PAIRS = (
    ("fp8_expand", "fp8_expand"),
    ("int8", "int8"),
    ("int8", "fp8_expand"),
    ("int8_softsign", "fp8_expand"),
    ("int4", "int4"),
)
HOW = {
    "fp32": "as they are",
    "bf16": "rounded",
    "int8": "blocks of 256, the dynamic map of arXiv 2110.02861",
    "int8_softsign": "blocks of 64, companded: most precise around zero; for first moments",
    "fp8": "E4M3, groups of 128",
    "fp8_expand": "E4M3 after range expansion (arXiv 2410.19313), groups of 128; for second moments",
    "int4": "groups of 128: squares for the first moment, geometric steps for the second",
}


def records(name: str) -> Rows:
    """Rows of a record, none where it has not been made."""
    return read_rows(RECORDS / name)


def one(rows: Rows, **wanted: Any) -> dict[str, Any]:
    (found,) = [row for row in rows if all(row.get(k) == v for k, v in wanted.items())]
    return found


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown's lines."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def scores() -> report.Scores:
    return report.Scores(schedule.Record(RECORDS / "optimizers.jsonl"), SIZE)


def difference(scored: report.Scores, setting: Setting, reference: Setting) -> tuple[float, float]:
    """Per cent by which the loss exceeds the reference's, and its standard error, over three seeds."""
    found = report.against(scored.losses(setting), scored.losses(reference))
    assert len(found) == 3, setting
    mean, error = report.mean_and_error(found)
    assert error is not None
    return mean, error


def shown(pair: tuple[float, float]) -> str:
    return "{:+.2f} ± {:.2f}".format(*pair)


def states() -> list[str]:
    """Bytes and loss of SmolLM2-135M by setting."""
    rows = records("states.jsonl")
    heads = ["setting", "optimizer state, bytes a parameter", "held-out loss", "optimizer step, × torch fused AdamW"]
    lines = []
    for name in STATES:
        row = one(rows, setting=name)
        figures = [f"{row['bytes_per_parameter']:.2f}", f"{row['heldout_loss']:.3f}", f"{row['step_ratio']:.1f}"]
        lines.append([f"`{name}`", *figures])
    return table(heads, lines)


def codec_table() -> list[str]:
    """Bytes a value, computed for a state of a million values."""
    numel = 2**20
    lines = []
    for name in (*codecs.CODECS, *codecs.PAIRS):
        first, second = (codec.nbytes(numel, signed=signed) / numel for codec, signed in _signs(name))
        how = HOW.get(name) or " for the first moment, ".join(f"`{c}`" for c in codecs.PAIRS[name]) + " for the second"
        lines.append([f"`{name}`", f"{first:.3f}", f"{second:.3f}", how])
    return table(["codec", "bytes a value, first moment", "second moment", "how"], lines)


def _signs(name: str) -> list[tuple[codecs.StateCodec, bool]]:
    return list(zip(codecs.codec_pair(name), (True, False), strict=True))


def update_errors() -> list[str]:
    """Error that a pair of codecs makes in AdamW's update, on three sets of moments."""
    rows = [row for row in records("codecs.jsonl") if row["kind"] == "pair"]
    lines, moments = [], list(dict.fromkeys(row["moments"] for row in rows))
    for first, second in PAIRS:
        found = [one(rows, m=first, v=second, moments=name) for name in moments]
        label = f"`{first},{second}`" + "".join(f" (`{n}`)" for n, p in codecs.PAIRS.items() if p == (first, second))
        cells = [f"{100 * r['relative_rms_error']:.2f} % / {r['worst_error']:.2f}" for r in found]
        lines.append([label, f"{found[0]['bytes_per_value']:.2f}", *cells])
    return table(["first moment, second moment", "bytes a parameter", *moments], lines)


def quality() -> list[str]:
    """A line a method, a column a codec."""
    scored = scores()
    lines = []
    for method in CODECS:
        settings = [Setting(method, codec) for codec in COLUMNS]
        cells = [shown(difference(scored, s, Setting(method))) if scored.losses(s) else "" for s in settings]
        lines.append([f"`{method}`", *cells])
    return table(["", *(f"`{c}`" for c in COLUMNS)], lines)


def bases() -> list[str]:
    """What Q-GaLore's ways with a basis cost, everything else in fp32."""
    scored = scores()
    first, *others = BASES
    heads = ["loss, %", *(" ".join(f"`{k}={v!r}`" for k, v in extra.items()).replace("'", '"') for extra in others)]
    lines = []
    for method in OF_BASES:
        found = [difference(scored, Setting(method, extra=e), Setting(method, extra=first)) for e in others]
        lines.append([f"`{method}`", *map(shown, found)])
    return table(heads, lines)


def weight_stores() -> list[str]:
    """bf16 weights, each way of writing them, against fp32 master weights at a third of the tuned rate."""
    scored = scores()
    masters, *others = [Setting("adamw", weights=store, rate_factor=STORE_RATE_FACTOR) for store in STORES]
    size = {"keep": "2", "bf16_sr": "2", "bf16_ecc": "3"}
    lines = [[f"`{s.weights}`", size[s.weights], shown(difference(scored, s, masters))] for s in others]
    return table(["`lowmem_weights`", "bytes a weight", "loss, % against fp32 masters"], lines)


def single_figures() -> dict[str, str]:
    """Figures of the text: how far two equal runs end from each other, and `subspace` from `svd`."""
    scored = scores()
    control = difference(scored, Setting("adamw", control=True), Setting("adamw"))[0]
    subspace = difference(scored, Setting("galore"), Setting("galore", extra={"projection": "svd"}))
    return {"control": f"{abs(control):.2f} %", "subspace": f"{shown(subspace)} %"}


def speed() -> list[str]:
    """Optimizers that keep AdamW's moments in fewer bytes, ours beside others'."""
    rows = records("optimizers_speed.jsonl")
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
        label = f"hf_lowmem `{name}`" if name in ours else name
        lines.append([label, f"{row['state_bytes_per_parameter']:.2f}", f"{row['step_ratio']:.1f}"])
    return table(["", "optimizer state, bytes a parameter", "step, × torch fused AdamW"], lines)


def long_run() -> list[str]:
    """20,000 steps on synthetic gradients: the window farthest from fp32 states, over all kinds of gradients."""
    rows = records("long_run.jsonl")
    if not rows:
        return [f"{NOT_YET.capitalize()}."]
    betas = sorted({row["beta2"] for row in rows}, reverse=True)
    lines = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        cells = []
        for beta in betas:
            found = [row for row in rows if (row["setting"], row["beta2"]) == (setting, beta)]
            ends = [row["second_moment"][-1] for row in found]
            worst = [x for row in found for x in row["update"]]
            cells.append(f"{_farthest(worst):.3f} / {_farthest(ends):.3f}" if found else "")
        lines.append([f"`{setting}`" if setting in COLUMNS else setting, *cells])
    steps = " or ".join(f"{n:,}" for n in sorted({row["steps"] for row in rows}))
    head = (
        f"{steps} steps. Ratio to fp32 states, 1 is equal, of the kind of gradients for which it is farthest from 1: "
        "the update's root mean square in its worst window / the second moment's at the end."
    )
    return [head, "", *table(["states", *(f"beta2 {beta:g}" for beta in betas)], lines)]


def _farthest(ratios: list[float]) -> float:
    return max(ratios, key=lambda x: abs(x - 1))


def long_steps() -> list[str]:
    """5,000 steps of a small Llama: `8bit` beside fp32 states, and the control."""
    lines = []
    for label, setting in (("`8bit`", Setting("adamw", "8bit")), ("control", Setting("adamw", control=True))):
        cells = [_long_difference(setting, loss) for loss in ("heldout_loss", "train_loss")]
        if any(cells):
            lines.append([label, *(cell or "" for cell in cells)])
    if not lines:
        return [f"{NOT_YET.capitalize()}."]
    heads = ["states, AdamW", "held-out loss, %", "training loss, %"]
    return [f"{LONG['steps']:,} steps, against fp32 states.", "", *table(heads, lines)]


def _long_difference(setting: Setting, loss: str) -> str | None:
    """None where no seed has both runs; "diverged" where one of them did."""
    rows = schedule.Record(RECORDS / "optimizers.jsonl").rows.values()
    runs = {(row["setting"], row["seed"]): row.get(loss) for row in rows if row["size"] == LONG}
    reference = Setting("adamw").name
    pairs = [
        (x, runs[reference, seed])
        for (name, seed), x in runs.items()
        if name == setting.name and (reference, seed) in runs
    ]
    if not pairs:
        return None
    found = [100 * (x / y - 1) for x, y in pairs if x is not None and y is not None]
    if len(found) < len(pairs):
        return "diverged"
    mean, error = report.mean_and_error(found)
    seeds = f"{len(found)} seed{'s' if len(found) > 1 else ''}"
    return f"{mean:+.2f} ({seeds})" if error is None else f"{mean:+.2f} ± {error:.2f} ({seeds})"


def long_line() -> list[str]:
    """One line about long runs, where `8bit` is recommended."""
    rows = [r for r in records("long_run.jsonl") if r["setting"] == "8bit"]
    short = _long_difference(Setting("adamw", "8bit"), "heldout_loss")
    update = NOT_YET
    if rows:
        off = abs(_farthest([x for row in rows for x in row["update"]]) - 1)
        update = (
            f"the update stays within {100 * off:.1f} % of fp32 states' for {max(r['steps'] for r in rows):,} steps"
        )
    loss = NOT_YET if short is None else short.replace(" (", " % (")
    control = _long_difference(Setting("adamw", control=True), "heldout_loss")
    if control is not None:
        loss += f"; of two runs with fp32 states against each other {control.replace(' (', ' % (')}"
    return [
        f"Long runs with `8bit`: on synthetic gradients {update}; loss of a small Llama after "
        f"{LONG['steps']:,} steps, against fp32 states: {loss}."
    ]


def zeroth() -> list[str]:
    """Methods of zeroth order, and AdamW beside them."""
    lines = []
    for row in records("zeroth.jsonl"):
        sizes = [f"{row[f'{kind}_bytes'] / 2**20:,.0f}" for kind in ("state", "peak")]
        losses = [f"{row[f'loss_{when}']:.3f}" for when in ("before", "after")]
        passes = str(row["forward_passes"]) + (f", {row['backward_passes']} backward" if row["backward_passes"] else "")
        lines.append([f"`{row['method']}`", str(row["steps"]), passes, *losses, *sizes])
    return table(
        ["method", "steps", "forward passes", "loss before", "after", "states, MiB", "peak of a step, MiB"], lines
    )


OPTIM: dict[str, Callable[[], list[str]]] = {
    "states": states,
    "codecs": codec_table,
    "update_errors": update_errors,
    "quality": quality,
    "bases": bases,
    "weight_stores": weight_stores,
    "speed": speed,
    "zeroth": zeroth,
    "long_run": long_run,
    "long_steps": long_steps,
    "long_line": long_line,
}
