"""Methods of zeroth order beside AdamW: SmolLM2-135M from its checkpoint, loss, forward passes and bytes at the peak.

    python scripts/bench/zeroth.py                 # about four minutes of one core; writes records/zeroth.jsonl
    python scripts/bench/zeroth.py --only mezo "mezo share=0.1"     # the others' rows stay

Every step sees the same batch, so that the loss on it after the steps, beside that before, is the method's doing and
not the data's: a few dozen forward passes move a held-out loss by less than batches differ. All methods of zeroth order
have the same number of forward passes; AdamW makes as many steps as `mezo`. Rates are those of a few tries on this
batch: what a row says is that the rule descends and what a step takes, not which rule is best.

The peak is the most that torch's allocator had given out in one more step, counted in its trace, with the weights and
states that were there before.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, cast

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from hf_lowmem.demo import data
from hf_lowmem.demo.model import load, prepare_model
from hf_lowmem.demo.run import HELD_OUT_PLAYS, public_name
from hf_lowmem.memory import optimizer_bytes
from hf_lowmem.optim import ZerothOrder, make_optimizer
from parts.record import RECORDS, Row, Rows, append_row, provenance, read_rows, write_rows

RECORD = RECORDS / "zeroth.jsonl"
TOKENS, BATCH, SEED = 64, 2, 0
RATES = {
    "mezo": 2e-5,
    "adamw": 2e-5,
    "zo_adam": 3e-5,
    "fzoo": 2e-7,
    "zo_conservative": 4e-5,
    "zo_sign": 4e-5,
    "zo_momentum": 4e-6,
    "zo_adamm": 1e-5,
    "mezo share=0.1": 2e-4,
    "mezo block_layers=6": 6e-5,
}
PASSES = {"mezo": 2, "zo_sign": 2, "zo_momentum": 2, "zo_adam": 2, "zo_adamm": 2, "zo_conservative": 5, "fzoo": 9}


class Event(Protocol):
    """What torch's profiler says of an allocation."""

    def name(self) -> str: ...
    def start_ns(self) -> int: ...
    def nbytes(self) -> int: ...


def peak_of(step: Callable[[], None], held: int) -> int:
    """The most bytes at once in `step()`, of which `held` were there before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    assert trace.profiler is not None
    assert trace.profiler.kineto_results is not None
    events = cast("list[Event]", trace.profiler.kineto_results.events())
    now = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return held + peak


def run(name: str, source: str, passes: int) -> Row:
    """One method from the checkpoint, on one batch."""
    train, _ = data.split_plays(data.load_plays(), held_out=HELD_OUT_PLAYS, seed=SEED)
    texts = data.sft_dataset(train, size=BATCH, tokens=TOKENS, seed=SEED)["text"]
    model, tokenizer = load(source)
    batch = tokenizer(list(texts), truncation=True, max_length=TOKENS, return_tensors="pt")

    def loss() -> torch.Tensor:
        return model(**batch, labels=batch["input_ids"]).loss

    method, *options = name.split()
    settings = {option: json.loads(value) for option, value in (o.split("=") for o in options)}
    optimizer = make_optimizer(method, model, lr=RATES[name], seed=SEED, **settings)

    def step() -> None:
        if isinstance(optimizer, ZerothOrder):
            optimizer.step(lambda: loss().detach())
            return
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    with torch.no_grad():
        before = loss().item()
    steps = max(1, passes // PASSES.get(method, 2))
    for _ in range(steps):
        step()
    with torch.no_grad():
        after = loss().item()
    weights = sum(p.nbytes for p in model.parameters())
    return {
        "method": name,
        "learning_rate": RATES[name],
        "steps": steps,
        "forward_passes": steps * PASSES.get(method, 1),
        "backward_passes": 0 if method in PASSES else steps,
        "loss_before": before,
        "loss_after": after,
        "weights_bytes": weights,
        "state_bytes": optimizer_bytes(optimizer),
        "peak_bytes": peak_of(step, weights + optimizer_bytes(optimizer)),
    }


def table(rows: Rows) -> Table:
    """What the rows say, for a terminal."""
    made = Table("method", "steps", "forward passes", "loss on the batch", "after", "states, MiB", "peak, MiB")
    for row in rows:
        sizes = (f"{row[f'{kind}_bytes'] / 2**20:,.0f}" for kind in ("state", "peak"))
        losses = (f"{row[f'loss_{when}']:.4f}" for when in ("before", "after"))
        made.add_row(row["method"], str(row["steps"]), str(row["forward_passes"]), *losses, *sizes)
    return made


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a local folder or hub name (default: SmolLM2-135M-Instruct from PyPI)")
    parser.add_argument("--passes", type=int, default=10, help="forward passes of each method")
    parser.add_argument("--only", nargs="*", choices=list(RATES), default=list(RATES))
    parser.add_argument("--record", type=Path, default=RECORD)
    options = parser.parse_args(arguments)
    common = {
        "command": f"python scripts/bench/zeroth.py --passes {options.passes}",
        "model": public_name(options.model),
        "tokens_a_step": TOKENS * BATCH,
        "seed": SEED,
        **provenance(),
    }
    write_rows(options.record, [row for row in read_rows(options.record) if row["method"] not in options.only])
    rows: Rows = []
    with tempfile.TemporaryDirectory() as cache:
        source = prepare_model(options.model, Path(cache))
        for name in options.only:
            rows.append(run(name, source, options.passes) | common)
            append_row(options.record, rows[-1])
    Console().print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
