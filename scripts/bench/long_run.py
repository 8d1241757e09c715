"""Whether the states of an optimizer stay where they should over a long run: 20,000 steps of AdamW beside fp32 states.

    python scripts/bench/long_run.py                    # 40 minutes or so on one core; writes records/long_run.jsonl
    python scripts/bench/long_run.py --report           # the table of the record
    python scripts/bench/long_run.py --steps 2000 --only 8bit int4 --betas2 0.999

A moment is an average of 1 / (1 - beta) steps. At beta2 = 0.999 a step moves it by a tenth of a per cent, less than
half of a step of any 8-bit code, and a codec that rounds to the nearest code loses what is smaller: that shows after
thousands of steps, and then more and more. So each codec runs beside fp32 states on the same synthetic gradients, and a
row of the record says, for each window of 1,000 steps, the root of the mean square of the update, and of the second
moment, as a ratio to fp32's. Weights are set to zero before each step, so that what they are after it is the update.

All kinds of gradients are parts of one parameter, in blocks of their own:

    stationary    normal, one size
    falling       the same, ten times smaller from a quarter of the run on
    rising        the same, ten times larger from a quarter of the run on
    rare          rows of 96 values, as of an embedding, of different sizes: each has a gradient in 2 % of the steps
    channels      normal, of log-normal size (sigma 1) from value to value
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_lowmem.optim import OPTIMIZERS, LowMemOptimizer
from parts.peers import PEERS
from parts.record import RECORDS, commit, read_rows, versions_of, write_rows

RECORD = RECORDS / "long_run.jsonl"
KINDS = ("stationary", "falling", "rising", "rare", "channels")
SHAPE = (32, 96)  # of each kind: 12 of the largest blocks
OURS = ("bf16", "int8", "int8_softsign", "fp8", "fp8_expand", "8bit", "int8,fp8_expand", "int4")
THEIRS = ("bitsandbytes AdamW8bit", "torchao AdamW8bit", "torchao AdamW4bit")
LIMITS = {"int4": 0.03}
LIMIT = 0.01
SAMPLED = 50  # steps from one look at the second moment to the next


def gradients(steps: int) -> Iterator[Tensor]:
    """(kinds, rows, columns) of each step, the same at each call."""
    draw = torch.Generator().manual_seed(0)
    sizes = torch.ones(len(KINDS), *SHAPE)
    sizes[KINDS.index("rare")] = torch.exp(torch.randn(SHAPE[0], 1, generator=draw))
    sizes[KINDS.index("channels")] = torch.exp(torch.randn(SHAPE, generator=draw))
    for step in range(steps):
        grad = torch.randn(len(KINDS), *SHAPE, generator=draw) * sizes
        if step >= steps // 4:
            grad[KINDS.index("falling")] /= 10
            grad[KINDS.index("rising")] *= 10
        grad[KINDS.index("rare")] *= torch.rand(SHAPE[0], 1, generator=draw) < 0.02
        yield grad


def build(name: str, beta2: float) -> tuple[Optimizer, nn.Parameter]:
    p = nn.Parameter(torch.zeros(len(KINDS), *SHAPE))
    settings: dict[str, Any] = {"lr": 1.0, "betas": (0.9, beta2), "weight_decay": 0.0}
    if name in THEIRS:
        return PEERS[name].load()([p], **settings), p
    return OPTIMIZERS["adamw"]([("w", p)], state=name, **settings), p


def second_moment(optimizer: Optimizer, p: nn.Parameter) -> Tensor:
    """It in fp32, of our optimizers, bitsandbytes' and torchao's."""
    state = optimizer.state[p]
    if isinstance(optimizer, LowMemOptimizer):
        return optimizer.slot(p, optimizer.param_groups[0]).load("exp_avg_sq")
    if "state2" in state:
        from bitsandbytes.functional import dequantize_blockwise

        return dequantize_blockwise(state["state2"], absmax=state["absmax2"], code=state["qmap2"], blocksize=256)
    v = state["exp_avg_sq"]
    return v.dequantize() if hasattr(v, "dequantize") else v


def measure(
    names: Sequence[str], beta2: float, steps: int, window: int, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """One row for each setting and kind of gradients; all settings see the same gradients, side by side."""
    built = {name: build(name, beta2) for name in ("fp32", *names)}
    squares = {name: torch.zeros(2, len(KINDS), dtype=torch.float64) for name in built}  # of updates, of v
    ratios: dict[str, list[Tensor]] = {name: [] for name in names}
    for step, grad in enumerate(gradients(steps), 1):
        for name, (optimizer, p) in built.items():
            p.data.zero_()
            p.grad = grad.clone()
            optimizer.step()
            squares[name][0] += p.detach().square().mean((1, 2))
            if step % SAMPLED == 0:
                squares[name][1] += second_moment(optimizer, p).view_as(p).square().mean((1, 2))
        if step % window == 0:
            for name in names:
                ratios[name].append((squares[name] / squares["fp32"]).sqrt())
            for both in squares.values():
                both.zero_()
            say(f"beta2 {beta2}: {step:,} steps")
    for name in names:
        for i, kind in enumerate(KINDS):
            update, v = ([round(x[j, i].item(), 5) for x in ratios[name]] for j in (0, 1))
            yield {
                "setting": name,
                "beta2": beta2,
                "gradients": kind,
                "steps": steps,
                "window": window,
                "update": update,
                "second_moment": v,
            }


def report(rows: Sequence[dict[str, Any]]) -> tuple[str, list[str]]:
    """A table with the window that is farthest from fp32, and ours that are outside of their limits."""
    lines = ["| states | beta2 | " + " | ".join(KINDS) + " |", "|---|---|" + "---|" * len(KINDS)]
    faults = []
    by = {(r["setting"], r["beta2"], r["gradients"]): r for r in rows}
    for setting, beta2 in dict.fromkeys((r["setting"], r["beta2"]) for r in rows):
        cells = []
        for kind in KINDS:
            row = by[setting, beta2, kind]
            worst = max(row["update"], key=lambda x: abs(x - 1))
            cells.append(f"{worst:.3f} / {row['update'][-1]:.3f} / {row['second_moment'][-1]:.3f}")
            if setting in OURS and abs(worst - 1) > LIMITS.get(setting, LIMIT):
                faults.append(f"{setting}, beta2 {beta2}, {kind}: {worst:.3f}")
        lines.append(f"| {setting} | {beta2} | " + " | ".join(cells) + " |")
    return "\n".join(lines), faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--window", type=int, default=1000)
    parser.add_argument("--betas2", type=float, nargs="+", default=[0.999, 0.99, 0.95])
    parser.add_argument("--only", nargs="+", choices=[*OURS, *THEIRS], default=[*OURS, *THEIRS])
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--report", action="store_true", help="only print the table of the record")
    args = parser.parse_args()

    console = Console(stderr=True)
    if not args.report:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")  # of the peers' imports
        common = {"versions": versions_of(("torch", "bitsandbytes", "torchao")), "commit": commit()}
        rows: list[dict[str, Any]] = []
        for beta2 in args.betas2:
            found = measure(args.only, beta2, args.steps, args.window, console.print)
            rows += [row | common for row in found]
            write_rows(args.record, rows)
    text, faults = report(read_rows(args.record))
    print("RMS of the update to fp32's: worst window / last window / of the second moment in the last window\n")
    print(text)
    for fault in faults:
        print(f"outside of its limit: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
