"""Rules with little state in fine-tuning a model on sums: right answers and loss, beside bytes of state.

    python scripts/bench/arithmetic.py             # five minutes or so on one core
    python scripts/bench/arithmetic.py --smoke     # seconds, and nothing that means anything

A Llama of a quarter of a million parameters learns to add two numbers of two digits by torch's AdamW in fp32, until it
answers some of the sums right that it has not seen, and each setting goes on from there on other sums. Its learning
rate is the best of a ladder by loss on a seed of its own, then three seeds are scored on sums that nobody trains on.
Beside Shakespeare (embeddings.py) it is a task with one right answer, and the other end of vocabularies: 14 tokens.

Every finished run is a line of the record under its full configuration; the same command makes what is missing.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see hf_lowmem/cli/main.py; read when torch is imported

import argparse
import copy
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lowmem.memory import optimizer_bytes
from hf_lowmem.optim import make_optimizer
from parts.preference.sums import EOS, Sum, build_model, completion_logps, encode, exact_match, split
from parts.record import RECORDS, Row, Rows, append_row, provenance, read_rows
from parts.small_llama import rate_at
from parts.tables import mean_and_error

RECORD = RECORDS / "arithmetic.jsonl"
SETTINGS: dict[str, tuple[str, Row]] = {
    "adamw": ("adamw", {}),
    "adam_mini": ("adam_mini", {}),
    "scale": ("scale", {}),
    "scale, adam": ("scale", {"embeddings": "adam"}),
}
STATE = "8bit"
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
TUNING_SEED, SEEDS = 100, (0, 1, 2)
SIZE: Row = {
    "sums": [3000, 2000, 400, 1200],  # for the start, for fine-tuning, to stop by, for the score
    "hidden": 96,
    "layers": 2,
    "start_rate": 2e-3,
    "start_batch": 64,
    "start_steps": 2000,  # at most
    "start_until": 0.5,  # right answers
    "look": 20,  # steps between two looks
    "steps": 100,
    "batch": 32,
    "warmup": 0.1,
}
SMOKE = SIZE | {"sums": [64, 32, 16, 16], "hidden": 32, "layers": 1, "start_steps": 4, "look": 2, "steps": 3}
IGNORED = -100


def batches(given: Sequence[Sum], steps: int, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, labels) of sums with their answers, of which alone labels are; all sums have prompts of one length."""
    draw = torch.Generator().manual_seed(seed)
    prompt = encode([s.prompt for s in given])
    answers = [encode([s.answer])[0].tolist() for s in given]
    width = max(map(len, answers)) + 1
    tails = torch.full((len(given), width), IGNORED)
    for row, answer in enumerate(answers):
        tails[row, : len(answer) + 1] = torch.tensor([*answer, EOS])
    labels = torch.cat([torch.full_like(prompt, IGNORED), tails], 1)
    ids = torch.cat([prompt, tails.clamp(min=0)], 1)
    for _ in range(steps):
        rows = torch.randint(len(given), (batch,), generator=draw)
        yield ids[rows], labels[rows]


def loss_of(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean over the tokens of answers; a causal model needs no mask for padding on the right."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, labels: Tensor) -> None:
    model.train()
    loss_of(model, ids, labels).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


@functools.cache
def parts_of(seed: int, smoke: bool) -> list[list[Sum]]:
    return split((SMOKE if smoke else SIZE)["sums"], seed)


@functools.cache
def start(seed: int, smoke: bool) -> nn.Module:
    """The model before fine-tuning."""
    size = SMOKE if smoke else SIZE
    learned, _, stop, _ = parts_of(seed, smoke)
    model = build_model(size["hidden"], size["layers"], seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size["start_rate"])
    every = batches(learned, size["start_steps"], size["start_batch"], seed)
    for step, (ids, labels) in enumerate(every, 1):
        descend(model, optimizer, ids, labels)
        if step % size["look"] == 0 and exact_match(model, stop) >= size["start_until"]:
            break
    return model


def score(model: nn.Module, held_out: Sequence[Sum]) -> tuple[float, float]:
    """Share of right answers, and nats a token of the right ones."""
    sums, tokens = completion_logps(model, [s.prompt for s in held_out], [s.answer for s in held_out])
    return exact_match(model, held_out), -float(sums.double().sum() / tokens.sum())


def run(name: str, *, rate: float, seed: int, smoke: bool) -> Row:
    """Fine-tune by one setting."""
    size = SMOKE if smoke else SIZE
    _, given, _, held_out = parts_of(seed, smoke)
    model = copy.deepcopy(start(seed, smoke))
    method, options = SETTINGS[name]
    optimizer = make_optimizer(method, model, lr=rate, state=STATE, seed=seed, **options)
    for step, (ids, labels) in enumerate(batches(given, size["steps"], size["batch"], seed + 1)):
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_at(step, size)
        descend(model, optimizer, ids, labels)
    before, after = score(start(seed, smoke), held_out), score(model, held_out)
    return configuration(name, rate, seed, smoke) | {
        "state_bytes_per_parameter": optimizer_bytes(optimizer) / sum(p.numel() for p in model.parameters()),
        "right_before": before[0],
        "right": after[0],
        "loss_before": before[1],
        "loss": after[1],
    }


def configuration(name: str, rate: float, seed: int, smoke: bool) -> Row:
    return {"setting": name, "state": STATE, "lr": rate, "seed": seed, "size": SMOKE if smoke else SIZE}


def key(row: Row) -> str:
    return json.dumps({k: row[k] for k in ("setting", "state", "lr", "seed", "size")}, sort_keys=True)


def best_rate(rows: Rows, name: str) -> float:
    """The rate that ends lowest on the tuning seed."""
    tried = [row for row in rows if row["setting"] == name and row["seed"] == TUNING_SEED]
    return min(tried, key=lambda row: row["loss"])["lr"]


def table(rows: Rows) -> list[str]:
    """Markdown: bytes, rate, right answers and loss, mean over seeds ± standard error."""
    lines = ["| method, rule of embedding and head | bytes a parameter | learning rate | right answers, % | loss |"]
    lines.append("|---" * 5 + "|")
    scored = [row for row in rows if row["seed"] != TUNING_SEED]
    before = {row["seed"]: (100 * row["right_before"], row["loss_before"]) for row in scored}
    if before:
        right, loss = (list(values) for values in zip(*before.values(), strict=True))
        lines.append(f"| before | | | {mean_and_error(right, 1)} | {mean_and_error(loss, 4)} |")
    for name in SETTINGS:
        found = [row for row in scored if row["setting"] == name]
        if found:
            method, _, rule = name.partition(", ")
            label = f"`{method}`" + (f", `{rule}`" if rule else "")
            size = f"{found[0]['state_bytes_per_parameter']:.3f} | {found[0]['lr']:g}"
            right, loss = [100 * row["right"] for row in found], [row["loss"] for row in found]
            lines.append(f"| {label} | {size} | {mean_and_error(right, 1)} | {mean_and_error(loss, 4)} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, a few steps")
    parser.add_argument("--only", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    common = {"command": "python scripts/bench/arithmetic.py", **provenance(("torch", "transformers"))}

    def make(name: str, rate: float, seed: int) -> None:
        if key(configuration(name, rate, seed, options.smoke)) in map(key, read_rows(options.record)):
            return
        row = run(name, rate=rate, seed=seed, smoke=options.smoke)
        append_row(options.record, row | common)
        print(f"{name}, lr {rate:g}, seed {seed}: {row['right']:.3f} {row['loss']:.4f}", flush=True)

    for name in options.only:
        for rate in RATES:
            make(name, rate, TUNING_SEED)
    for scored in SEEDS:
        for name in options.only:
            make(name, best_rate(read_rows(options.record), name), scored)
    print("\n".join(table(read_rows(options.record))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
