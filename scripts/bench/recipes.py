"""Recipes of scripts/ on the small Llama, each beside what it would replace: growth in depth, means, adapters.

    python scripts/bench/recipes.py             # some eight minutes of one core
    python scripts/bench/recipes.py --smoke     # seconds, and no loss that means anything

Growth: that Llama, of four layers, from nothing, and one that is trained with two or one for a part of the compute,
grown by scripts/grow_depth.py, and trained on with a new optimizer and warm-up. Compute is parameters without the
input embedding, times tokens; all runs get the same. Beside them the part alone, before and behind the growth.

Means: a run by a constant learning rate, one by a cosine to zero, with checkpoints in their last third; their means by
scripts/merge_checkpoints.py, plain and with powers of the metric. The power is chosen on one half of the held-out text
and scored on the other, where every checkpoint is scored as well.

Adapters: that Llama, trained for a while with all weights, goes on with LoRA, with DyLoRA, which is scored at several
ranks, and with NOLA; on the same data in the same order. Bytes are those of the adapter's file.

Two seeds, one learning rate for all: that of records/optimizers.jsonl for this Llama, whether or not it suits each.
Every finished run is a line of the record under its full configuration, and the same command makes what is missing.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see hf_lowmem/cli/main.py; read when torch is imported

import argparse
import contextlib
import copy
import functools
import io
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import TrainerCallback

from hf_lowmem import LowMemTrainer, LowMemTrainingArguments
from parts.record import RECORDS, ROOT, Row, Rows, append_row, of_part, provenance, read_rows
from parts.small_llama import SIZE, SMOKE, batches, build_model, clip_, heldout_loss, rate_at, texts_of
from parts.tables import markdown, mean_and_error

sys.path.append(str(ROOT / "scripts"))
import grow_depth
import merge_checkpoints
import train_dylora
import train_nola

RECORD = RECORDS / "recipes.jsonl"
SEEDS, RATE = (0, 1), 3e-3
DEEP: Row = {"layers": 4, "steps": 200}
SHARE = 0.25  # of the compute, before growth
FACTORS = (1, 2, 4)  # 1: from nothing
RUN: Row = {"steps": 200, "checkpoints": 6}
ENDS = ("constant", "cosine")
Share = Callable[[int, Row], float]
MORE: Row = {"steps": 150, "adapted": 100}
LARGEST, RANKS = 8, (1, 8)
ADAPTERS = (*(("lora", rank) for rank in RANKS), ("dylora", LARGEST), ("nola", 64), ("nola", 512))
PENALTIES = (0.0, 4.0, 16.0, 64.0)


def train(model: nn.Module, size: Row, seed: int, share: Share, ranks: Callable[[int], int] | None = None) -> None:
    """Train by torch's AdamW, at a share of the rate, and a rank of DyLoRA's, that depend on the step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=size["weight_decay"])
    model.train()
    for step, ids in enumerate(batches(size, seed)):
        for group in optimizer.param_groups:
            group["lr"] = RATE * share(step, size)
        if ranks is not None:
            train_dylora.set_rank(model, ranks(step))
        model(input_ids=ids, labels=ids).loss.backward()
        clip_(list(model.parameters()), size["clip"], bf16=False)
        optimizer.step()
        optimizer.zero_grad()


def score(model: nn.Module, size: Row) -> float:
    model.eval()
    return heldout_loss(lambda ids: model(input_ids=ids, labels=ids).loss, size)


def warmed(step: int, size: Row) -> float:
    """A constant rate behind the warm-up."""
    return min(1.0, (step + 1) / max(1, round(size["warmup"] * size["steps"])))


def cost(model: LlamaForCausalLM) -> int:
    """Parameters that a token meets in products."""
    return model.num_parameters() - model.model.embed_tokens.weight.numel()


def growth(factor: int, seed: int, size: Row) -> Row:
    """A deep model, from nothing or grown, after as much compute."""
    deep = build_model(size, seed, bf16=False)
    if factor == 1:
        train(deep, size, seed, rate_at)
        return {"loss": score(deep, size)}
    small = build_model(size | {"layers": size["layers"] // factor}, seed, bf16=False)
    before = round(SHARE * size["steps"])
    cheap = round(before * cost(deep) / cost(small))
    first = size | {"layers": size["layers"] // factor, "steps": cheap}
    train(small, first, seed, warmed)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        source, grown = Path(folder) / "small", Path(folder) / "grown"
        small.save_pretrained(source)
        assert grow_depth.main([str(source), "--factor", str(factor), "--output", str(grown)]) == 0
        deep = LlamaForCausalLM.from_pretrained(grown)
    rest = size | {"steps": size["steps"] - before}
    row: Row = {"steps": [cheap, rest["steps"]], "small": score(small, size), "grown": score(deep, size)}
    train(deep, rest, seed + 1000, rate_at)
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


def settings(end: str, seed: int, size: Row) -> Row:
    """Fields of a run."""
    return {
        "optim": "adamw",
        "lowmem_state": "fp32",
        "learning_rate": RATE,
        "max_steps": size["steps"],
        "seed": seed,
        "per_device_train_batch_size": size["batch"],
        "per_device_eval_batch_size": 16,
        "weight_decay": size["weight_decay"],
        "warmup_steps": round(size["warmup"] * size["steps"]),
        "max_grad_norm": size["clip"],
        "lr_scheduler_type": "cosine" if end == "cosine" else "constant_with_warmup",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
    }


def means(end: str, seed: int, size: Row) -> Row:
    """A run, its checkpoints and their means, each scored on the half that chooses nothing."""
    chooses, scores = halves(size)
    every = max(1, size["steps"] // 3 // size["checkpoints"])
    steps = [size["steps"] - every * i for i in reversed(range(size["checkpoints"]))]
    rows = torch.cat(list(batches(size, seed)))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = LowMemTrainingArguments(folder, **settings(end, seed, size))
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


def adapter_of(kind: str, number: int) -> LoraConfig:
    """LoRA of a rank, DyLoRA up to one, NOLA of so many matrices."""
    given: Row = {"target_modules": "all-linear", "lora_alpha": 2 * LARGEST}
    if kind == "nola":
        return train_nola.NolaConfig(r=LARGEST, nola_bases=number, **given)
    given["lora_alpha"] = 2 * number if kind == "lora" else 2 * LARGEST
    config = LoraConfig(r=number, **given)
    return train_dylora.dylora(config) if kind == "dylora" else config


def file_bytes(model: PeftModel) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return (Path(folder) / train_dylora.ADAPTER).stat().st_size


@functools.cache
def begun(seed: int, size: str) -> LlamaForCausalLM:
    """The model that adapters go on from."""
    model = build_model(json.loads(size), seed, bf16=False)
    train(model, json.loads(size), seed, rate_at)
    return model


def adapters(way: tuple[str, int], seed: int, size: Row) -> Row:
    """One adapter on a model that was trained with all weights."""
    base = copy.deepcopy(begun(seed, json.dumps(size)))
    row: Row = {"before": score(base, size)}
    torch.manual_seed(seed)
    kind, number = way
    model = get_peft_model(base, adapter_of(kind, number))
    ranks = (lambda step: train_dylora.rank_of(seed, step, number)) if kind == "dylora" else None
    train(model, size | {"steps": size["adapted"]}, seed + 1000, rate_at, ranks)
    row["bytes"] = {str(number): file_bytes(model)}
    if kind != "dylora":
        return row | {"loss": {str(number): score(model, size)}}
    row["loss"] = {}
    for rank in [rank for rank in RANKS if rank <= number]:
        train_dylora.set_rank(model, rank)
        row["loss"][str(rank)] = score(model, size)
    return row


RUNS: dict[str, Callable[..., Row]] = {"growth": growth, "means": means, "adapters": adapters}
WAYS: dict[str, Sequence[object]] = {"growth": FACTORS, "means": ENDS, "adapters": [list(way) for way in ADAPTERS]}


def key(row: Row) -> str:
    return json.dumps({k: row.get(k) for k in ("part", "way", "lr", "seed", "size")}, sort_keys=True)


def end_of(row: Row) -> object:
    return row["chooses"][-1] if row["part"] == "means" else row["loss"]


def mean_of(values: Sequence[float]) -> str:
    return mean_and_error(values, 3)


def scored(rows: Rows, part: str, way: object) -> Rows:
    return [row for row in of_part(rows, part) if row["way"] == way]


def growth_table(rows: Rows) -> list[str]:
    """Markdown: held-out loss by way, mean over seeds ± standard error."""
    lines = []
    for factor in FACTORS:
        found = scored(rows, "growth", factor)
        if not found:
            continue
        parts = [mean_of([row[name] for row in found]) if factor > 1 else "" for name in ("small", "grown")]
        layers = found[0]["size"]["layers"]
        begun = f"{layers} layers from nothing" if factor == 1 else f"{layers // factor}, then grown by {factor}"
        lines.append([begun, *parts, mean_of([row["loss"] for row in found])])
    heads = ["at equal compute", "loss before growth", "right after it", "at the end"]
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
        lines.append([end, *steps, best, plain, mean_of([chosen(row) for row in found])])
    heads = ["learning rate", "first checkpoint", "last", "best of six", "plain mean", "mean by metric"]
    return markdown(heads, lines).splitlines()


def adapters_table(rows: Rows) -> list[str]:
    """Markdown: bytes of an adapter's file, and held-out loss."""
    names = {"lora": "LoRA of rank {}", "dylora": "one DyLoRA, first {} ranks", "nola": "NOLA, {} matrices"}
    lines = []
    for kind, number in ADAPTERS:
        found = scored(rows, "adapters", [kind, number])
        if found and not lines:
            lines.append(["before", "", mean_of([row["before"] for row in found])])
        for part in found[0]["loss"] if found else []:
            size = found[0]["bytes"].get(part)
            loss = mean_of([row["loss"][part] for row in found])
            lines.append([names[kind].format(part), "" if size is None else f"{size / 1024:.0f}", loss])
    return markdown(["adapter", "file, KiB", "loss"], lines).splitlines()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, a few steps")
    parser.add_argument("--part", nargs="*", choices=list(RUNS), default=list(RUNS))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    common = {"command": "python scripts/bench/recipes.py", **provenance(("torch", "transformers"))}
    small = SMOKE | {"steps": 6, "heldout_windows": 8}
    sizes = {"growth": SIZE | DEEP, "means": SIZE | RUN, "adapters": SIZE | MORE}
    if options.smoke:
        sizes = {
            "growth": small | {"layers": 4},
            "means": small | {"checkpoints": 2},
            "adapters": small | {"adapted": 4},
        }
    for part in options.part:
        for seed, way in itertools.product(SEEDS, WAYS[part]):
            row = {"part": part, "way": way, "lr": RATE, "seed": seed, "size": sizes[part]}
            if key(row) in map(key, read_rows(options.record)):
                continue
            row |= RUNS[part](way, seed, sizes[part])
            append_row(options.record, row | common)
            print(f"{part}, {way}, seed {seed}: {end_of(row)}", flush=True)
    rows = read_rows(options.record)
    print("\n".join([*growth_table(rows), "", *means_table(rows), "", *adapters_table(rows)]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
