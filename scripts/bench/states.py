"""Optimizer state in bytes a parameter, beside the loss it cost: SmolLM2-135M on Shakespeare, one run a setting.

    python scripts/bench/states.py                 # about ten minutes on two cores; writes records/states.jsonl
    python scripts/bench/states.py --steps 2 --only adamw-int8

Each row of the record: setting, learning rate, state bytes (counted and predicted) a parameter, training loss (mean of
the last quarter of the steps), held-out loss before and after, seconds of the optimizer's step as a ratio to torch's
AdamW in the same call, device, versions, commit. Same seed, data, order and number of steps for every setting.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see hf_lowmem/cli/main.py; read when torch is imported

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hf_lowmem.demo import data
from hf_lowmem.demo.model import load, prepare_model
from hf_lowmem.demo.run import HELD_OUT_PLAYS, RATES, public_name
from hf_lowmem.demo.score import Referee
from hf_lowmem.memory import optimizer_bytes
from hf_lowmem.optim import LowMemOptimizer, make_optimizer
from parts.record import RECORDS, provenance, write_rows

RECORD = RECORDS / "states.jsonl"
TOKENS, BATCH, SEED = 128, 2, 0

# name → (method, options); `torch` is torch.optim.AdamW itself
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "torch-adamw": ("torch", {}),
    **{f"adamw-{c}": ("adamw", {"state": c}) for c in ("fp32", "bf16", "int8", "fp8", "fp8_expand")},
    **{f"apollo-r256-{c}": ("apollo", {"state": c, "rank": 256}) for c in ("fp32", "int8")},
    **{f"apollo_mini-{c}": ("apollo_mini", {"state": c}) for c in ("fp32", "int8")},
}


def build(method: str, options: dict[str, Any], model: torch.nn.Module) -> torch.optim.Optimizer:
    if method == "torch":
        return torch.optim.AdamW(model.parameters(), lr=RATES["adamw_torch"], weight_decay=0.0, fused=True)
    lr = RATES["adamw_torch" if method == "adamw" else "apollo_mini"]
    return make_optimizer(method, model, lr=lr, seed=SEED, **options)


def run(name: str, source: str, steps: int, heldout: int) -> dict[str, Any]:
    """Train one setting and measure it."""
    method, options = SETTINGS[name]
    train, aside = data.split_plays(data.load_plays(), held_out=HELD_OUT_PLAYS, seed=SEED)
    texts = data.sft_dataset(train, size=steps * BATCH, tokens=TOKENS, seed=SEED)["text"]
    referee = Referee(
        data.sft_dataset(aside, size=heldout, tokens=TOKENS, seed=SEED),
        data.pair_dataset(aside, size=1, lines=2, seed=SEED),
        TOKENS,
    )
    model, tokenizer = load(source)
    before = referee.loss(model, tokenizer)
    optimizer = build(method, options, model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=optimizer.param_groups[0]["lr"], total_steps=steps + 1, pct_start=0.1, cycle_momentum=False
    )
    losses, seconds = [], []
    model.train()
    for step in track(range(steps), description=name):
        batch = tokenizer(
            list(texts[step * BATCH : (step + 1) * BATCH]), truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        began = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    count = sum(p.numel() for p in model.parameters())
    predicted = None
    if isinstance(optimizer, LowMemOptimizer):
        predicted = sum(optimizer.state_bytes(p, g) for g in optimizer.param_groups for p in g["params"]) / count
    return {
        "setting": name,
        "learning_rate": optimizer.defaults["lr"],
        "options": options,
        "parameters": count,
        "bytes_per_parameter": optimizer_bytes(optimizer) / count,
        "bytes_per_parameter_foretold": predicted,
        "train_loss": statistics.fmean(losses[-max(1, steps // 4) :]),
        "heldout_loss_before": before,
        "heldout_loss": referee.loss(model, tokenizer),
        "optimizer_step_seconds": statistics.median(seconds[1:] or seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a local folder or hub name (default: SmolLM2-135M-Instruct from PyPI)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--heldout", type=int, default=32, help="held-out texts")
    parser.add_argument("--only", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--record", type=Path, default=RECORD)
    options = parser.parse_args()

    common = {
        "command": f"python scripts/bench/states.py --steps {options.steps} --heldout {options.heldout}",
        "model": public_name(options.model),
        "steps": options.steps,
        "tokens_a_step": TOKENS * BATCH,
        "seed": SEED,
        **provenance(),
    }
    with tempfile.TemporaryDirectory() as cache:
        source = prepare_model(options.model, Path(cache))
        rows = [run(name, source, options.steps, options.heldout) for name in options.only]
    theirs = next((r["optimizer_step_seconds"] for r in rows if r["setting"] == "torch-adamw"), None)
    table = Table("setting", "bytes/parameter", "train loss", "held-out loss", "step, × torch fused AdamW")
    for row in rows:
        row["step_ratio"] = row["optimizer_step_seconds"] / theirs if theirs else None
        ratio = f"{row['step_ratio']:.1f}" if theirs else ""
        table.add_row(
            row["setting"],
            f"{row['bytes_per_parameter']:.3f}",
            f"{row['train_loss']:.4f}",
            f"{row['heldout_loss']:.4f}",
            ratio,
        )
    write_rows(options.record, [row | common for row in rows])
    Console().print(table)


if __name__ == "__main__":
    main()
