"""Recipes of scripts/ on the small Llama: growth in depth, and means of checkpoints, each beside what it would replace.

    python scripts/bench/recipes.py             # half an hour or so on one core
    python scripts/bench/recipes.py --smoke     # seconds, and no loss that means anything

Growth: a Llama of eight layers from nothing, and one that is trained with four or two layers for a part of the compute,
grown by scripts/grow_depth.py, and trained on with a new optimizer and warm-up. Compute is parameters without the
input embedding, times tokens; all runs get the same. Beside them the part alone, before and behind the growth.

Means: a run by a constant learning rate, one by a cosine to zero, with checkpoints in their last third; their means by
scripts/merge_checkpoints.py, plain and with powers of the metric. The power is chosen on one half of the held-out text
and scored on the other, where every checkpoint is scored as well.

Learning rates are the best of a ladder on a seed of their own; three seeds are scored. Every finished run is a line of
the record under its full configuration, and the same command makes what is missing.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see hf_lowmem/cli/main.py; read when torch is imported

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import TrainerCallback

from hf_lowmem import LowMemTrainer, LowMemTrainingArguments
from parts.record import RECORDS, ROOT, Row, Rows, append_row, of_part, provenance, read_rows
from parts.small_llama import SIZE, SMOKE, batches, build_model, clip_, heldout_loss, rate_at, texts_of
from parts.tables import markdown

sys.path.append(str(ROOT / "scripts"))
import grow_depth
import merge_checkpoints

RECORD = RECORDS / "recipes.jsonl"
TUNING_SEED, SEEDS = 100, (0, 1, 2)
RATES = (1e-3, 3e-3)
DEEP: Row = {"layers": 8, "steps": 600}
SHARE = 0.25  # of the compute, before growth
FACTORS = (1, 2, 4)  # 1: from nothing
RUN: Row = {"steps": 450, "checkpoints": 6}
ENDS = ("constant", "cosine")
PENALTIES = (0.0, 4.0, 16.0, 64.0)


def train(model: LlamaForCausalLM, size: Row, rate: float, seed: int, share: Callable[[int, Row], float]) -> None:
    """Train by torch's AdamW, at a share of the rate that depends on the step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=size["weight_decay"])
    model.train()
    for step, ids in enumerate(batches(size, seed)):
        for group in optimizer.param_groups:
            group["lr"] = rate * share(step, size)
        model(input_ids=ids, labels=ids).loss.backward()
        clip_(list(model.parameters()), size["clip"], bf16=False)
        optimizer.step()
        optimizer.zero_grad()


def score(model: LlamaForCausalLM, size: Row) -> float:
    model.eval()
    return heldout_loss(lambda ids: model(input_ids=ids, labels=ids).loss, size)


def warmed(step: int, size: Row) -> float:
    """A constant rate behind the warm-up."""
    return min(1.0, (step + 1) / max(1, round(size["warmup"] * size["steps"])))


def cost(model: LlamaForCausalLM) -> int:
    """Parameters that a token meets in products."""
    return model.num_parameters() - model.get_input_embeddings().weight.numel()


def growth(factor: int, rate: float, seed: int, size: Row) -> Row:
    """A deep model, from nothing or grown, after as much compute."""
    deep = build_model(size, seed, bf16=False)
    if factor == 1:
        train(deep, size, rate, seed, rate_at)
        return {"loss": score(deep, size)}
    small = build_model(size | {"layers": size["layers"] // factor}, seed, bf16=False)
    cheap = round(SHARE * size["steps"] * cost(deep) / cost(small))
    first = size | {"layers": size["layers"] // factor, "steps": cheap}
    train(small, first, rate, seed, warmed)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        source, grown = Path(folder) / "small", Path(folder) / "grown"
        small.save_pretrained(source)
        assert grow_depth.main([str(source), "--factor", str(factor), "--output", str(grown)]) == 0
        deep = LlamaForCausalLM.from_pretrained(grown)
    rest = size | {"steps": size["steps"] - round(SHARE * size["steps"])}
    row: Row = {"steps": [cheap, rest["steps"]], "small": score(small, size), "grown": score(deep, size)}
    train(deep, rest, rate, seed + 1000, rate_at)
    return row | {"loss": score(deep, size)}


class Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Windows of a text as rows of a data set."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def halves(size: Row) -> tuple[Tensor, Tensor]:
    """Windows of the first half of the held-out text, and of the second."""
    _, text = texts_of(size)
    made = []
    for part in text.split(-(-len(text) // 2)):
        starts = torch.linspace(0, len(part) - size["tokens"], size["heldout_windows"] // 2).long()
        made.append(part[starts[:, None] + torch.arange(size["tokens"])])
    return made[0], made[1]


@torch.no_grad()
def loss_on(folder: Path, windows: Tensor) -> float:
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    return statistics.fmean(model(input_ids=some, labels=some).loss.item() for some in windows.split(16))


class Save(TrainerCallback):
    """Evaluate and save at given steps."""

    def __init__(self, steps: set[int]) -> None:
        self.steps = steps

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> TrainerControl:
        control.should_save = control.should_evaluate = state.global_step in self.steps
        return control


def means(end: str, rate: float, seed: int, size: Row) -> Row:
    """A run, its checkpoints and their means, each scored on the half that chooses nothing."""
    chooses, scores = halves(size)
    every = max(1, size["steps"] // 3 // size["checkpoints"])
    steps = [size["steps"] - every * i for i in reversed(range(size["checkpoints"]))]
    rows = torch.cat(list(batches(size, seed)))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = LowMemTrainingArguments(
            folder, optim="adamw", lowmem_state="fp32", learning_rate=rate, max_steps=size["steps"], seed=seed,
            per_device_train_batch_size=size["batch"], per_device_eval_batch_size=16, weight_decay=size["weight_decay"],
            warmup_steps=round(size["warmup"] * size["steps"]), max_grad_norm=size["clip"], use_cpu=True,
            lr_scheduler_type="cosine" if end == "cosine" else "constant_with_warmup", report_to="none",
            disable_tqdm=True, save_strategy="no", logging_strategy="no",
        )  # fmt: skip
        data = {"train_dataset": Windows(rows), "eval_dataset": Windows(chooses)}
        LowMemTrainer(build_model(size, seed, bf16=False), args, **data, callbacks=[Save({*steps})]).train()
        folders = [Path(folder) / f"checkpoint-{step}" for step in steps]
        made: Row = {"steps": steps, "checkpoints": [loss_on(f, scores) for f in folders]}
        made["chooses"] = [loss_on(f, chooses) for f in folders]
        for penalty in PENALTIES:
            out = Path(folder) / f"merged-{penalty:g}"
            arguments = [*map(str, folders), "--output", str(out), "--penalty", str(penalty)]
            assert merge_checkpoints.main(arguments) == 0
            made[f"mean {penalty:g}"] = [loss_on(out, chooses), loss_on(out, scores)]
        return made


def key(row: Row) -> str:
    return json.dumps({k: row.get(k) for k in ("part", "way", "lr", "seed", "size")}, sort_keys=True)


def end_of(row: Row) -> float:
    return row["loss"] if row["part"] == "growth" else row["chooses"][-1]


def best_rate(rows: Rows, part: str, way: object) -> float:
    """The rate that ends lowest on the tuning seed."""
    tried = [r for r in of_part(rows, part) if r["way"] == way and r["seed"] == TUNING_SEED]
    return min(tried, key=end_of)["lr"]


def mean_of(values: Sequence[float]) -> str:
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{error}"


def scored(rows: Rows, part: str, way: object) -> Rows:
    return [row for row in of_part(rows, part) if row["way"] == way and row["seed"] != TUNING_SEED]


def growth_table(rows: Rows) -> list[str]:
    """Markdown: held-out loss by way, mean over seeds ± standard error."""
    lines = []
    for factor in FACTORS:
        found = scored(rows, "growth", factor)
        if not found:
            continue
        parts = [mean_of([row[name] for row in found]) if factor > 1 else "" for name in ("small", "grown")]
        begun = "8 layers from nothing" if factor == 1 else f"{8 // factor} layers, then grown by {factor}"
        rate = f"{found[0]['lr']:g}"
        lines.append([begun, rate, *parts, mean_of([row["loss"] for row in found])])
    heads = ["at equal compute", "learning rate", "loss before growth", "right after it", "at the end"]
    return markdown(heads, lines).splitlines()


def chosen(row: Row) -> float:
    """The loss of the mean whose power was chosen on the other half of the text."""
    return min((row[f"mean {penalty:g}"] for penalty in PENALTIES), key=lambda pair: pair[0])[1]


def means_table(rows: Rows) -> list[str]:
    """Markdown: held-out loss of checkpoints and means."""
    lines = []
    for end in ENDS:
        found = scored(rows, "means", end)
        if not found:
            continue
        steps = [mean_of([row["checkpoints"][i] for row in found]) for i in (0, -1)]
        best = mean_of([min(row["checkpoints"]) for row in found])
        plain = mean_of([row["mean 0"][1] for row in found])
        lines.append([end, f"{found[0]['lr']:g}", *steps, best, plain, mean_of([chosen(row) for row in found])])
    heads = ["learning rate's end", "rate", "first checkpoint", "last", "best of six", "plain mean", "mean by metric"]
    return markdown(heads, lines).splitlines()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, a few steps")
    parser.add_argument("--part", nargs="*", choices=["growth", "means"], default=["growth", "means"])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    common = {"command": "python scripts/bench/recipes.py", **provenance(("torch", "transformers"))}
    small = SMOKE | {"steps": 6, "heldout_windows": 8}
    sizes = {"growth": SIZE | DEEP, "means": SIZE | RUN}
    if options.smoke:
        sizes = {"growth": small | {"layers": 4}, "means": small | {"checkpoints": 2}}
    ways: dict[str, Sequence[object]] = {"growth": FACTORS, "means": ENDS}
    runs: dict[str, Callable[..., Row]] = {"growth": growth, "means": means}

    def make(part: str, way: object, rate: float, seed: int) -> None:
        row = {"part": part, "way": way, "lr": rate, "seed": seed, "size": sizes[part]}
        if key(row) in map(key, read_rows(options.record)):
            return
        row |= runs[part](way, rate, seed, sizes[part])
        append_row(options.record, row | common)
        print(f"{part}, {way}, lr {rate:g}, seed {seed}: {end_of(row):.4f}", flush=True)

    for part in options.part:
        for way in ways[part]:
            for rate in RATES:
                make(part, way, rate, TUNING_SEED)
        for seed in SEEDS:
            for way in ways[part]:
                make(part, way, best_rate(read_rows(options.record), part, way), seed)
    rows = read_rows(options.record)
    print("\n".join([*growth_table(rows), "", *means_table(rows)]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
