"""Gradients that are added up in int8: their error, and the loss of runs that train on them.

    python scripts/bench/accumulation.py            # half an hour or so on one core
    python scripts/bench/accumulation.py --smoke    # seconds, and no loss that means anything

The small Llama of parts/small_llama.py, whose step is several micro-batches of two sequences.

Errors: of its gradients after some steps of AdamW, summed over k micro-batches by `lowmem_accumulation="int8_sr"`, and
by `.grad` of bf16 weights, against sums in fp32; as a part of the sum's norm, over all weights that are added up in
int8. Beside them how far two sums over other micro-batches are from each other, divided by the root of two: the noise
that a gradient has anyway.

Losses: runs from nothing with four micro-batches a step, whose gradients are summed in fp32, or in int8; the same
seeds, weights and data. A control, whose first weights differ by 2**-20, says which difference means nothing. Nothing
is clipped, which step in backward cannot.

Every finished row stays in the record under its full configuration, and the same command makes what is missing.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see hf_lowmem/cli/main.py; read when torch is imported

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from hf_lowmem.optim import StepInBackward, accumulator, make_optimizer
from parts.record import RECORDS, Row, Rows, append_row, of_part, provenance, read_rows
from parts.small_llama import SIZE, SMOKE, batches, build_model, heldout_loss, rate_at
from parts.tables import markdown

RECORD = RECORDS / "accumulation.jsonl"
PASSES = (2, 4, 16, 64)
MICRO = 2  # sequences of a micro-batch; SIZE's batch is four of them
METHODS = {"adamw": 3e-3}  # and the learning rate, near that of records/optimizers.jsonl
RUN = {"steps": 150}
SUMS = ("fp32", "int8_sr", "control")
SEEDS = (0, 1, 2)
WARM = 40  # steps before gradients are looked at


def micro_batches(size: Row, seed: int) -> Iterator[Tensor]:
    for ids in batches(size, seed):
        yield from ids.split(MICRO)


def gradients(model: LlamaForCausalLM, ids: Tensor) -> dict[str, Tensor]:
    """Of one micro-batch, of the weights that are added up in int8."""
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    large = ((n, p) for n, p in model.named_parameters() if accumulator.nbytes(p.numel()) is not None)
    return {n: p.grad.clone() for n, p in large if p.grad is not None}


def norm(parts: dict[str, Tensor]) -> float:
    return torch.stack([t.double().norm() for t in parts.values()]).norm().item()


def errors(size: Row, seed: int, smoke: bool) -> Iterator[Row]:
    """A row for each number of passes."""
    model = build_model(size, seed, bf16=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=METHODS["adamw"])
    for ids in itertools.islice(batches(size, seed), WARM):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for passes in PASSES[:2] if smoke else PASSES:
        data = itertools.islice(itertools.cycle(micro_batches(size | {"steps": 2 * max(PASSES)}, seed + 1)), 2 * passes)
        made = [gradients(model, ids) for ids in data]
        mine, other = made[:passes], made[passes:]
        ours = make_optimizer("lion", model, seed=seed)
        groups = {id(p): group for group in ours.param_groups for p in group["params"]}
        coded, rounded = dict[str, Tensor](), dict[str, Tensor]()
        for name, p in model.named_parameters():
            if name not in mine[0]:
                continue
            for grad in mine[:-1]:
                p.grad = grad[name]
                assert ours.accumulate_param(p, groups[id(p)], coded=True)
            p.grad = mine[-1][name].clone()
            accumulator.take(p, ours.state[p])
            coded[name] = p.grad
            rounded[name] = torch.zeros_like(p, dtype=torch.bfloat16)
            for grad in mine:
                rounded[name] += grad[name].bfloat16()
        truth, twin = (
            {n: torch.stack([g[n] for g in some]).double().sum(0) for n in mine[0]} for some in (mine, other)
        )
        parts = [
            norm({n: found[n].double() - truth[n] for n in truth}) / norm(truth) for found in (coded, rounded, twin)
        ]
        yield {"passes": passes, "int8_sr": parts[0], "bf16": parts[1], "noise": parts[2] / 2**0.5}


def train(method: str, sums: str, size: Row, seed: int) -> Row:
    """A run from nothing."""
    model = build_model(size, seed, bf16=False, control=sums == "control")
    rate, last, losses = METHODS[method], False, list[float]()
    optimizer = make_optimizer(method, model, lr=rate, weight_decay=size["weight_decay"], seed=seed)
    if sums == "int8_sr":
        StepInBackward(optimizer, ready=lambda: last, accumulation=sums)
    for step, ids in enumerate(batches(size, seed)):
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_at(step, size)
        parts, total = ids.split(MICRO), 0.0
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            loss = model(input_ids=part, labels=part).loss / len(parts)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    score = heldout_loss(lambda ids: model(input_ids=ids, labels=ids).loss, size)
    return {"train_loss": statistics.fmean(losses[-max(1, len(losses) // 4) :]), "heldout_loss": score}


def key(row: Row) -> str:
    return json.dumps({k: row.get(k) for k in ("part", "method", "sums", "passes", "seed", "size")}, sort_keys=True)


def error_table(rows: Rows) -> list[str]:
    """Markdown: per cent of the sum, mean over seeds."""
    lines = []
    for passes in dict.fromkeys(row["passes"] for row in of_part(rows, "errors")):
        found = [row for row in of_part(rows, "errors") if row["passes"] == passes]
        means = [statistics.fmean(row[name] for row in found) for name in ("int8_sr", "bf16", "noise")]
        lines.append([str(passes), f"{100 * means[0]:.2f}", f"{100 * means[1]:.2f}", f"{100 * means[2]:.0f}"])
    return markdown(["micro-batches", "`int8_sr`", "`.grad` in bf16", "another sample of data"], lines).splitlines()


def loss_table(rows: Rows) -> list[str]:
    """Markdown: per cent of the held-out loss by which a run exceeds that of fp32 sums, seed by seed."""
    scored = {(r["method"], r["sums"], r["seed"]): r["heldout_loss"] for r in of_part(rows, "losses")}
    lines = []
    for method in METHODS:
        cells = []
        for sums in SUMS[1:]:
            seeds = [seed for seed in SEEDS if {(method, "fp32", seed), (method, sums, seed)} <= scored.keys()]
            apart = [100 * (scored[method, sums, s] / scored[method, "fp32", s] - 1) for s in seeds]
            mean, error = statistics.fmean(apart), statistics.stdev(apart) / len(apart) ** 0.5
            cells.append(f"{mean:+.2f} ± {error:.2f}")
        lines.append([f"`{method}`", *cells])
    return markdown(["loss, % against sums in fp32", "`int8_sr`", "control"], lines).splitlines()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Gradients added up in int8: error, and loss.")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, a few steps")
    options = parser.parse_args(arguments)
    size = SMOKE | {"batch": 4} if options.smoke else SIZE
    common: Row = {"command": "python scripts/bench/accumulation.py", **provenance(("torch", "transformers"))}

    def have(row: Row) -> bool:
        return key(row) in map(key, read_rows(options.record))

    for seed in SEEDS:
        made = {"part": "errors", "seed": seed, "size": size}
        if not all(have({**made, "passes": n}) for n in PASSES[: 2 if options.smoke else None]):
            for row in errors(size, seed, options.smoke):
                append_row(options.record, made | row | common)
    size = size if options.smoke else size | RUN
    for seed in SEEDS:
        for method, sums in itertools.product(METHODS, SUMS):
            row = {"part": "losses", "method": method, "sums": sums, "seed": seed, "size": size}
            if not have(row):
                row |= {"lr": METHODS[method]} | train(method, sums, size, seed)
                append_row(options.record, row | common)
                print(f"{method}, {sums}, seed {seed}: {row['heldout_loss']:.4f}", flush=True)
    rows = read_rows(options.record)
    print("\n".join([*error_table(rows), "", *loss_table(rows)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
