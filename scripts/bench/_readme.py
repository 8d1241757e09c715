"""Tables of every README, made from the records.

    python scripts/bench/_readme.py            # says which README does not show what the records say; status 1 if any
    python scripts/bench/_readme.py --write    # rewrites them

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, where NAME is a key of `TABLES`. What is there is
replaced as a whole; all else in a README is written by hand. tests/test_readme.py compares both.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import accumulation as sums
import arithmetic as added
import embeddings as embedding_rules
import long_sequences
import plan_table as plans
import recipes
import weights as stores
import weights_peers as peers
import wire as sent
import zeroth_offload
from _readme_optim import OPTIM, difference, one, records, scores, single_figures, table
from hf_lowmem.specs import TIERS
from hf_lowmem.training.presets import PRESETS, WEIGHTS
from parts.preference import report as preferences
from parts.products import report as multiplied
from parts.record import RECORDS, ROOT, Rows, of_part

__all__ = ["TABLES", "difference", "one", "readmes", "records", "rewritten", "scores", "single_figures"]

MARKED = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
# Front page: (budget, record, sequences) of one line each.
WHICH = (("16GiB", "8B", 1), ("24GiB", "1B", 8), ("24GiB", "8B", 1), ("48GiB", "8B", 1), ("80GiB", "8B", 1))
BUDGETS = {"8B": "budget.jsonl", "1B": "budget_1b.jsonl"}
CHOICES = ["`optim`", "`lowmem_state`", "`lowmem_weights`", "`lowmem_activations`", "`lowmem_step_in_backward`"]
MEMORY = {
    "HF AdamW, fused, checkpointing": "HuggingFace's AdamW, checkpointing",
    "ours: AdamW, checkpointing": "`adamw` with `8bit` states, checkpointing",
    "ours: APOLLO, checkpoint_fp8": "`apollo` with `8bit` states, `checkpoint_fp8`",
    "ours: APOLLO, checkpoint_fp8, step in backward": "the same, step in backward",
    "ours: APOLLO-Mini, scale, int8, in backward": "`apollo_mini`, ends by `scale`, `int8_sr`, in backward",
}


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def cells_of(chosen: dict[str, Any]) -> list[str]:
    """A choice of the budget's search, one cell a field of CHOICES; what is left at its default is named so."""
    tier = chosen.get("lowmem_activations")
    if tier is None:
        tier = "no checkpointing" if chosen.get("gradient_checkpointing") is False else "checkpointing"
    cells = [chosen.get(name) for name in ("optim", "lowmem_state", "lowmem_weights")]
    coded = [f"`{cell}`" if cell else "" for cell in cells]
    coded[0] = coded[0] or "HuggingFace's"
    if (rule := chosen.get("lowmem_embeddings")) is not None:
        coded[0] += f", `{rule}` for embedding and head"
    kept = tier.replace(",", ", ") if " " in tier or tier == "checkpointing" else f"`{tier}`"
    return [*coded, kept, f"`{chosen['lowmem_step_in_backward']}`" if "lowmem_step_in_backward" in chosen else ""]


def asked(row: dict[str, Any]) -> str:
    """Sequences of a step, and the micro-batch and accumulation into which the search has split them."""
    chosen = row["chosen"] or {}
    batch = row["per_device_train_batch_size"]
    micro = chosen.get("per_device_train_batch_size", batch)
    return str(batch) if micro == batch else f"{batch} as {micro} × {chosen['gradient_accumulation_steps']}"


def which() -> list[str]:
    """Five cards and models, the settings that `lowmem_budget` chooses for them, and what they need."""
    lines = []
    for budget, model, batch in WHICH:
        row = one(records(BUDGETS[model]), budget=budget, per_device_train_batch_size=batch, max_length=2048)
        lines.append([f"{budget[:2]} GiB", model, asked(row), *cells_of(row["chosen"]), gib(row["reserved_bytes"])])
    return table(["card", "Llama", "sequences a step", *CHOICES, "needs"], lines)


def budget() -> list[str]:
    """Every search of the two records."""
    lines = []
    for model, name in BUDGETS.items():
        for row in records(name):
            length = "longest" if row["max_length"] == "auto" else f"{row['max_length']:,}"
            chosen = row["chosen"] or row["smallest"]
            need = gib(row["reserved_bytes"]) + ("" if row["chosen"] else ", no fit")
            if "longest" in row:
                need += f" at {row['longest']:,}"
            following = gib(row["next"]["reserved_bytes"]) if row["chosen"] and row["next"] else ""
            cells = cells_of(chosen | ({"optim": row["optim"]} if "optim" in row else {}))
            lines.append([row["budget"], model, asked(row), length, *cells, need, following])
    heads = ["budget", "Llama", "sequences", "tokens", *(c.replace("lowmem_", "") for c in CHOICES[:-1]), "in backward"]
    return table([*heads, "needs", "next"], lines)


def _peaks(names: dict[str, str]) -> list[str]:
    """Peaks at every length by setting, and what is known of its cost in loss, part by part."""
    rows, costs_of = records("plan_table.jsonl"), plans.loss_costs
    lengths = sorted({row["tokens"] for row in rows})
    lines = []
    for name, label in names.items():
        found = {row["tokens"]: row for row in rows if row["setting"] == name}
        costs = dict(re.findall(r"(\w+) ([^,]+)", costs_of(found[lengths[0]]["fields"])))
        cells = [gib(found[tokens]["peak_bytes"]) for tokens in lengths]
        lines.append([label, *cells, *(costs.get(part, "") for part in ("weights", "states", "activations"))])
    heads = [f"{tokens:,} tokens" for tokens in lengths]
    return table(["", *heads, "loss, %: weights", "states", "activations"], lines)


def memory() -> list[str]:
    return _peaks(MEMORY)


def presets() -> list[str]:
    """Fields of each preset, with the states, peaks and losses of the recorded setting that has the same."""
    rows, lines = records("plan_table.jsonl"), []
    for preset, fields in PRESETS.items():
        tier = {} if "lowmem_activations" in fields else {"gradient_checkpointing": True}
        whole = {k: v for k, v in fields.items() if k != "lowmem_reference"} | {"lowmem_weights": WEIGHTS} | tier
        found = {row["tokens"]: row["peak_bytes"] for row in rows if row["fields"] == whole}
        parts = [row["parts"] for row in rows if row["fields"] == whole]
        states = max(part["states"] / (part["weights"] / 2) for part in parts)  # of weights in bf16
        costs = dict(re.findall(r"(\w+) ([^,]+)", plans.loss_costs(whole)))
        peaks = [gib(found[tokens]) for tokens in (min(found), max(found))]
        known = [costs.get(part, "") for part in ("weights", "states", "activations")]
        lines.append([f"`{preset}`", *cells_of(whole), f"{states:.2f}", *peaks, *known])
    heads = [name.strip("`").removeprefix("lowmem_").replace("step_in_backward", "in backward") for name in CHOICES]
    lengths = sorted({row["tokens"] for row in rows})
    peaks = [f"{tokens:,} tokens" for tokens in (lengths[0], lengths[-1])]
    return table(["preset", *heads, "bytes", *peaks, "loss, %: weights", "states", "activations"], lines)


def plan_table() -> list[str]:
    return _peaks({name: name for name in dict.fromkeys(row["setting"] for row in records("plan_table.jsonl"))})


def plan_fields() -> list[str]:
    """The fields of each setting; those that all of ours have are said in the text."""
    fields = {row["setting"]: row["fields"] for row in records("plan_table.jsonl")}
    common = plans.EIGHT_BIT
    lines, above = [], dict[str, object]()
    for name, values in fields.items():
        of_all = {} if not name.startswith("ours") else {k: v for k, v in common.items() if k != "optim"}
        shown = " ".join(f"`{k}={v}`" for k, v in values.items() if k not in {*of_all, "max_grad_norm"})
        if not values.items() >= of_all.items():  # one field is another, and the row would be too wide to read
            (changed,) = values.items() - above.items()
            shown = "as above, with `{}={}`".format(*changed)
        lines.append([name, shown])
        above = values
    return table(["", "fields"], lines)


def plan_vs_cpu() -> list[str]:
    """What a step was planned to take, and took, on a CPU."""
    lines = []
    for row in records("plan_vs_cpu.jsonl"):
        planned, took = (f"{row[k]['peak'] / 2**20:,.1f}" for k in ("foretold", "measured"))
        lines.append([row["setting"], planned, took, f"{100 * (row['ratio']['peak'] - 1):+.3f} %"])
    return table(["setting", "planned peak, MiB", "measured peak, MiB", "difference"], lines)


def activations() -> list[str]:
    """A line a tier: bytes of two shapes, gradient error, loss, peak."""
    rows = records("activations.jsonl")
    lines = []
    for way in ("HuggingFace", "checkpointing", *TIERS):
        kept = [f"{one(rows, part='bytes', case=case, way=way)['units']:.2f}" for case in ("Llama-2-7B", "Llama-3-8B")]
        peak = one(rows, part="peaks", case="16,384 tokens, gradients freed in backward", way=way)["peak"]
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
        lines.append([name, *kept, error, loss, gib(peak)])
    heads = ["", "kept by a layer of Llama-2-7B's shape", "of Llama-3-8B's", "gradient error", "held-out loss"]
    return table([*heads, "peak, Llama-3-8B, 16,384 tokens"], lines)


def demo() -> list[str]:
    """The four trainings of the recorded demo."""
    return _demo("demo.json")


def demo_smallest() -> list[str]:
    """The three trainings of its `--smallest`."""
    return _demo("demo_smallest.json")


def _demo(name: str) -> list[str]:
    record = json.loads((RECORDS / name).read_text())
    assert record["mode"] == "full"
    lines = []
    for row in record["training"]:
        parts = [f"{row[part] / 2**20:,.0f}" for part in ("weights", "gradients", "optimizer", "saved", "peak")]
        lines.append([row["run"], *parts, f"{row['heldout_loss']:.3f}", f"{row['relative_speed']:.2f}"])
    heads = ["run", "weights, MiB", "gradients", "optimizer state", "saved activations", "peak RSS"]
    return table([*heads, "held-out loss", "relative tokens/s"], lines)


def collapse() -> list[str]:
    """What preference losses do to answers that were right; the learning rate by exact match on validation."""
    rows = [row for row in records("preference.jsonl") if row["part"] == "collapse"]
    lines = []
    for method in ("start", *preferences.methods_of(rows)):
        cells = []
        for measure in ("exact", "margin_accuracy", "chosen"):
            values = preferences.collapse_scores(rows, method, "exact", measure)
            cells.append("" if (method, measure) == ("start", "margin_accuracy") else f"{statistics.fmean(values):.2f}")
        lines.append([method, *cells])
    return table(["", "exact match", "accuracy of the margin", "mean log p, chosen"], lines)


def preference_memory() -> list[str]:
    """Peaks of forward and backward by vocabulary, gradients freed in backward; ways of equal peaks are one column."""
    rows = [row for row in records("preference.jsonl") if row["part"] == "memory" and row["freed"]]
    ours = [row["way"] for row in rows if row["way"].startswith("hf_lowmem")]
    columns = {
        "TRL DPO": ["TRL DPO"],
        "TRL ORPO, CPO": ["TRL ORPO", "TRL CPO"],
        "ours: DPO precomputed, ASFT, ORPO, SimPO, CPO": [way for way in ours if not way.endswith("shared")],
        "ours, prompts shared": [way for way in ours if way.endswith("shared")],
    }
    lines = []
    for vocabulary in dict.fromkeys(row["vocabulary"] for row in rows):
        cells = []
        for ways in columns.values():
            (cell,) = {f"{one(rows, way=way, vocabulary=vocabulary)['peak'] / 2**30:.2f} GiB" for way in ways}
            cells.append(cell)
        lines.append([f"{vocabulary:,}", *cells])
    return table(["vocabulary", *columns], lines)


def preference_time() -> list[str]:
    """Time of a pair as a ratio to TRL's ORPO, by vocabulary."""
    rows = [row for row in records("preference.jsonl") if row["part"] == "time"]
    vocabularies = list(dict.fromkeys(row["vocabulary"] for row in rows))
    lines = []
    for way in dict.fromkeys(row["way"] for row in rows):
        ratios = [one(rows, way=way, vocabulary=vocabulary)["ratio"] for vocabulary in vocabularies]
        lines.append([way, *(f"{ratio:.2f}" for ratio in ratios)])
    return table(["time of a pair, × TRL's ORPO", *(f"vocabulary {v:,}" for v in vocabularies)], lines)


def wire() -> list[str]:
    """Bytes that a process sends, by method."""
    return sent.table(records("wire.jsonl"), "layers")


def embeddings() -> list[str]:
    """Loss and bytes of fine-tuning by the rule of embedding and head."""
    return embedding_rules.table(records("embeddings.jsonl"))


def accumulation() -> list[str]:
    """Error of gradients that are added up in int8, by the number of micro-batches."""
    return sums.error_table(records("accumulation.jsonl"))


def accumulation_loss() -> list[str]:
    """Loss of runs that train on them, beside sums in fp32."""
    return sums.loss_table(records("accumulation.jsonl"))


def cpu_layers() -> list[str]:
    """CPU time of a model's layers by tier, beside HuggingFace's own."""
    rows = records("cpu_layers.jsonl")
    lines = []
    for way in dict.fromkeys(row["way"] for row in rows):
        times = {row["runs"]: f"{row['ratio']:.2f}" for row in rows if row["way"] == way}
        plain = way.startswith("HuggingFace")
        lines.append([way if plain else f"`{way}`", times["" if plain else "kernels"], times.get("reference", "")])
    return table(["four layers of SmolLM2-135M, forward and backward", "with kernels", "by the reference"], lines)


def weights_peers() -> list[str]:
    """Int8 in training by other packages and by us: bytes and loss."""
    return peers.run_table(records("weights_peers.jsonl"))


def weights_drift() -> list[str]:
    """What updates of zero do to each store."""
    return peers.drift_table(records("weights_peers.jsonl"))


def arithmetic() -> list[str]:
    """Fine-tuning on sums by rules with little state."""
    return added.table(records("arithmetic.jsonl"))


def targets() -> list[str]:
    """How many kernels compile for each GPU target, and how many of them spill registers."""
    rows = records("kernels_targets.jsonl")
    lines = []
    for target in dict.fromkeys(row["target"] for row in rows):
        found = [row for row in rows if row["target"] == target]
        spilling = [row for row in found if row["spills"]]
        most = f", at most {max(row['spills'] for row in spilling)} bytes a thread" if spilling else ""
        lines.append([f"`{target}`", str(len(found)), f"{len(spilling)}{most}"])
    return table(["target", "kernels and shapes compiled", "of them with spilled registers"], lines)


def sample() -> list[str]:
    """Errors of gradients from a share of the rows, and what is kept."""
    rows, lines = records("sample.jsonl"), []
    kept = {row["share"]: f"{row['saved_bytes'] / 2**20:,.0f}" for row in rows if row["part"] == "kept"}
    found = {(row["share"], row["by"]): row for row in rows if row["part"] == "error"}
    for share in sorted({share for share, by in found if by != "codes"}, reverse=True):
        errors = [f"{100 * found[share, by]['one_draw']:.0f}" for by in ("x", "uniform", "x g")]
        many = found[share, "x"].get("mean_of_draws")
        lines.append([f"{share:.0%}", *errors, "" if many is None else f"{100 * many:.0f}", kept.get(share, "")])
    codes = f"all, in E4M3: {100 * found[1.0, 'codes']['one_draw']:.1f}"
    lines.append(["all", codes, "", "", "", kept[1.0]])
    heads = ["rows kept", "error, %: drawn by the input", "uniformly", "by input and gradient", "mean of 25 draws"]
    return table([*heads, "kept, MiB"], lines)


def products(part: str) -> Rows:
    return of_part(records("products.jsonl"), part)


TABLES: dict[str, Callable[[], list[str]]] = OPTIM | {
    "which": which,
    "memory": memory,
    "budget": budget,
    "plan_table": plan_table,
    "presets": presets,
    "plan_fields": plan_fields,
    "plan_vs_cpu": plan_vs_cpu,
    "activations": activations,
    "demo": demo,
    "demo_smallest": demo_smallest,
    "weights": lambda: stores.table(records("weights.jsonl")).splitlines(),
    "weights_peers": weights_peers,
    "weights_drift": weights_drift,
    "arithmetic": arithmetic,
    "collapse": collapse,
    "preference_memory": preference_memory,
    "preference_time": preference_time,
    "wire": wire,
    "embeddings": embeddings,
    "accumulation": accumulation,
    "accumulation_loss": accumulation_loss,
    "targets": targets,
    "cpu_layers": cpu_layers,
    "sample": sample,
    "growth": lambda: recipes.growth_table(records("recipes.jsonl")),
    "merged": lambda: recipes.means_table(records("recipes.jsonl")),
    "adapters": lambda: recipes.adapters_table(records("recipes.jsonl")),
    "zeroth_offload": lambda: zeroth_offload.table(records("zeroth_offload.jsonl")),
    "products_error": lambda: multiplied.errors(products("error")),
    "products_loss": lambda: multiplied.losses([*products("loss"), *products("finetune")]),
    "products_long": lambda: multiplied.drift(products("long")),
    "products_cost": lambda: multiplied.costs(products("cost")),
    "long_sequences": lambda: long_sequences.table(records("long_sequences.jsonl")),
    "long_auto": lambda: long_sequences.table_of_auto(records("long_sequences.jsonl")),
    "long_real": lambda: long_sequences.table_of_real(records("long_sequences.jsonl")),
}


def readmes() -> list[Path]:
    """Every README of this clone, and CONTRIBUTING."""
    rooms = sorted([*ROOT.glob("hf_lowmem/**/README.md"), *ROOT.glob("scripts/**/README.md")])
    return [ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md", ROOT / "integrations" / "README.md", *rooms]


def rewritten(text: str) -> str:
    """The text with its tables made anew. Raises KeyError for a name that is not in TABLES."""
    return MARKED.sub(lambda match: f"{match[1]}" + "\n".join(TABLES[match[2]]()) + f"\n{match[4]}", text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="rewrite the files")
    options = parser.parse_args(arguments)
    differ = 0
    for path in readmes():
        text = path.read_text(encoding="utf-8")
        made = rewritten(text)
        if made == text:
            continue
        differ += 1
        print(f"{path.relative_to(ROOT)}: {'rewritten' if options.write else 'differs from the records'}")
        if options.write:
            path.write_text(made, encoding="utf-8")
    return 0 if options.write else int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
