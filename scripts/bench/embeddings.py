"""Rules of embedding and output head in fine-tuning: loss beside bytes of state.

    python scripts/bench/embeddings.py            # a quarter of an hour or so on one core
    python scripts/bench/embeddings.py --smoke    # seconds, and no loss that means anything

The small Llama of parts/small_llama.py is trained by AdamW on the first half of its text, and fine-tuned on the second
by each setting from those same weights; held-out plays score it. The learning rate is tuned for each setting on a seed
of its own, by the ladder of RATES; then three seeds, each with first weights, training and data of its own. Every
finished run is a line of the record under its full configuration, and the same command makes what is missing.

`heldout_loss_before` is the model's before fine-tuning. A vocabulary of 1,024 is seen almost whole by each batch, which
is kind to `scale`: see its docstring.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see hf_lowmem/cli/main.py; read when torch is imported

import argparse
import copy
import functools
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from hf_lowmem.memory import optimizer_bytes
from hf_lowmem.optim import make_optimizer
from parts.record import RECORDS, Row, Rows, append_row, provenance, read_rows
from parts.small_llama import SIZE, SMOKE, build_model, clip_, heldout_loss, rate_at, texts_of

RECORD = RECORDS / "embeddings.jsonl"
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"apollo_mini, {rule}": ("apollo_mini", {"embeddings": rule}) for rule in ("adam", "scale", "adam_mini")},
    "scale": ("scale", {}),
    "adamw": ("adamw", {}),
}
STATE = "8bit"
RATES = (3e-3, 1e-2, 3e-2)
BEFORE_RATE = 3e-3  # AdamW's from nothing, records/optimizers.jsonl
TUNING_SEED, SEEDS = 100, (0, 1, 2)
FINE_TUNING = {"steps": 80, "warmup": 0.1}


def batches(text: Tensor, size: dict[str, Any], seed: int) -> Iterator[Tensor]:
    """(batch, tokens), drawn anywhere in the text."""
    draw = torch.Generator().manual_seed(seed)
    within = torch.arange(size["tokens"])
    for _ in range(size["steps"]):
        yield text[torch.randint(len(text) - size["tokens"], (size["batch"], 1), generator=draw) + within]


def train(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, text: Tensor, size: Row, seed: int) -> list[float]:
    """Losses of the steps."""
    peak, losses = optimizer.param_groups[0]["lr"], list[float]()
    for step, ids in enumerate(batches(text, size, seed)):
        for group in optimizer.param_groups:
            group["lr"] = peak * rate_at(step, size)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        clip_(list(model.parameters()), size["clip"], bf16=False)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@functools.cache
def trained(smoke: bool, seed: int) -> LlamaForCausalLM:
    """The model before fine-tuning."""
    size = SMOKE if smoke else SIZE
    text, _ = texts_of(size)
    model = build_model(size, seed, bf16=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=BEFORE_RATE, weight_decay=size["weight_decay"])
    train(model, optimizer, text[: len(text) // 2], size, seed)
    return model


def score(model: LlamaForCausalLM, size: Row) -> float:
    return heldout_loss(lambda ids: model(input_ids=ids, labels=ids).loss, size)


def run(name: str, *, rate: float, seed: int, smoke: bool) -> Row:
    """Fine-tune by one setting."""
    size = (SMOKE if smoke else SIZE) | ({} if smoke else FINE_TUNING)
    text, _ = texts_of(size)
    start = trained(smoke, seed)
    model = copy.deepcopy(start)
    method, options = SETTINGS[name]
    optimizer = make_optimizer(method, model, lr=rate, state=STATE, seed=seed, **options)
    losses = train(model, optimizer, text[len(text) // 2 :], size, seed + 1)
    count = sum(p.numel() for p in model.parameters())
    return configuration(name, rate=rate, seed=seed, size=size) | {
        "state_bytes_per_parameter": optimizer_bytes(optimizer) / count,
        "train_loss": statistics.fmean(losses[-max(1, len(losses) // 4) :]),
        "heldout_loss_before": score(start, size),
        "heldout_loss": score(model, size),
    }


def configuration(name: str, *, rate: float, seed: int, size: Row) -> Row:
    return {"setting": name, "state": STATE, "lr": rate, "seed": seed, "size": size}


def key(row: Row) -> str:
    return json.dumps({k: row[k] for k in ("setting", "state", "lr", "seed", "size")}, sort_keys=True)


def best_rate(rows: Rows, name: str) -> float:
    """The rate that ends lowest on the tuning seed."""
    tried = [row for row in rows if row["setting"] == name and row["seed"] == TUNING_SEED]
    return min(tried, key=lambda row: row["heldout_loss"])["lr"]


def against_adam(rows: Rows, name: str) -> str | None:
    """Difference of a setting's loss to `adam` for embedding and head, seed by seed; None of fewer than two."""
    scored = {n: [r for r in rows if r["setting"] == n and r["seed"] != TUNING_SEED] for n in (*SETTINGS, name)}
    reference = {row["seed"]: row["heldout_loss"] for row in next(iter(scored.values()))}
    found = scored[name]
    apart = [100 * (row["heldout_loss"] / reference[row["seed"]] - 1) for row in found if row["seed"] in reference]
    if len(apart) < 2:
        return None
    return f"{statistics.fmean(apart):+.2f} ± {statistics.stdev(apart) / len(apart) ** 0.5:.2f}"


def table(rows: Rows) -> list[str]:
    """Markdown: bytes, rate, mean loss over seeds, difference to `adam` for embedding and head seed by seed."""
    lines = [
        "| method, rule of embedding and head | bytes a parameter | learning rate | loss, held out | against `adam` |",
        "|---|---|---|---|---|",
    ]
    scored = {name: [r for r in rows if r["setting"] == name and r["seed"] != TUNING_SEED] for name in SETTINGS}
    for name, found in scored.items():
        if not found:
            continue
        losses = [row["heldout_loss"] for row in found]
        apart = against_adam(rows, name)
        shown = "not measured" if apart is None else f"{apart} %"
        method, _, rule = name.partition(", ")
        cells = f"`{method}`" + (f", `{rule}`" if rule else ""), f"{found[0]['state_bytes_per_parameter']:.3f}"
        lines.append(f"| {' | '.join(cells)} | {found[0]['lr']:g} | {statistics.fmean(losses):.4f} | {shown} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Rules of embedding and head: loss beside bytes, in fine-tuning.")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, a few steps")
    parser.add_argument("--only", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    options = parser.parse_args(arguments)
    common = {"command": "python scripts/bench/embeddings.py", **provenance(("torch", "transformers"))}

    def make(name: str, rate: float, seed: int) -> None:
        size = (SMOKE if options.smoke else SIZE) | ({} if options.smoke else FINE_TUNING)
        if key(configuration(name, rate=rate, seed=seed, size=size)) in map(key, read_rows(options.record)):
            return
        row = run(name, rate=rate, seed=seed, smoke=options.smoke)
        append_row(options.record, row | common)
        print(f"{name}, lr {rate:g}, seed {seed}: {row['heldout_loss']:.4f}", flush=True)

    for name in options.only:
        for rate in RATES:
            make(name, rate, TUNING_SEED)
    for seed in SEEDS:
        for name in options.only:
            make(name, best_rate(read_rows(options.record), name), seed)
    print("\n".join(table(read_rows(options.record))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
