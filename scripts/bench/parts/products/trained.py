"""Loss of models trained with products in 8 bits, beside bf16, on the same weights and text.

`loss`: the small Llama, 2,000 steps, three seeds. `long`: it again for 20,000 steps at one rate, so that a drift would
show. `finetune`: SmolLM2-135M from its checkpoint.
"""

import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_lowmem.activations.linears import linears_of_layers
from hf_lowmem.demo import data
from hf_lowmem.demo.model import load, prepare_model
from hf_lowmem.matmul import OwnedProducts
from hf_lowmem.matmul.spec import MatmulSpec
from parts.record import Row, Rows
from parts.small_llama import SIZE, SMOKE, batches, build_model, clip_, heldout_loss, rate_at

SEEDS = (0, 1, 2)
WAYS = ("bf16", "fp8_row", "int8_row", "fp8_tensor")
RATE = 3e-3

LONG = SIZE | {"steps": 20_000, "batch": 2, "tokens": 48}
LONG_SMOKE = SMOKE | {"steps": 4}
LONG_RATE = 1e-3  # all the way: a schedule that ends at zero would hide what has drifted

TUNED = {"steps": 100, "batch": 2, "tokens": 128, "heldout": 64, "rate": 3e-5}
TUNED_SMOKE = TUNED | {"steps": 2, "tokens": 16, "heldout": 2}


@contextmanager
def products_of(way: str, model: nn.Module) -> Iterator[None]:
    """The model's layers multiply in this way; afterwards plainly again."""
    owned = None if way == "bf16" else OwnedProducts(linears_of_layers(model), MatmulSpec(recipe=way, least=0))
    try:
        yield
    finally:
        if owned is not None:
            owned.take_off()


def forward_of(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(input_ids=ids, labels=ids).loss


def steps_of(
    way: str, model: nn.Module, fed: Iterable[Tensor], rates: Iterable[float], decay: float, clip: float
) -> Iterator[float]:
    """The loss of each step of AdamW on fp32 weights under autocast to bf16."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=decay, fused=True)
    model.train()
    with products_of(way, model):
        for ids, rate in zip(fed, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate
            loss = forward_of(model, ids)
            loss.backward()
            clip_(list(model.parameters()), clip, bf16=False)
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item()


def loss_rows(
    smoke: bool, old: Rows, *, steps: int, ways: Sequence[str] = WAYS, seeds: Sequence[int] = SEEDS
) -> Iterator[Row]:
    """Runs that are missing in `old`."""
    size = SMOKE if smoke else SIZE | {"steps": steps}
    done = {(row["way"], row["seed"]) for row in old if row["size"] == size}
    for seed in seeds[:1] if smoke else seeds:
        for way in ways:
            if (way, seed) not in done:
                yield loss_row(way, seed, size)


def loss_row(way: str, seed: int, size: Row) -> Row:
    model = build_model(size, seed, bf16=False)
    rates = [RATE * rate_at(step, size) for step in range(size["steps"])]
    began = time.perf_counter()
    losses = list(steps_of(way, model, batches(size, seed), rates, size["weight_decay"], size["clip"]))
    seconds = time.perf_counter() - began
    return {
        "case": f"Llama 0.9M on Shakespeare, {len(losses)} steps",
        "way": way,
        "seed": seed,
        "size": size,
        "train_loss": statistics.fmean(losses[-max(1, len(losses) // 4) :]),
        "heldout_loss": heldout_loss(partial(forward_of, model), size),  # of plain products: of what would be saved
        "seconds": seconds,
    }


def long_rows(smoke: bool, old: Rows, ways: Sequence[str] = WAYS) -> Iterator[Row]:
    """Runs of 20,000 steps that are missing in `old`: held-out loss after each half, by the products that it trains
    with, and the training loss of each twentieth."""
    size = LONG_SMOKE if smoke else LONG
    done = {row["way"] for row in old if row["size"] == size}
    for way in (way for way in ways if way not in done):
        model = build_model(size, 0, bf16=False)
        fed = steps_of(way, model, batches(size, 0), [LONG_RATE] * size["steps"], size["weight_decay"], size["clip"])
        losses: list[float] = []
        heldout: list[float] = []
        for loss in fed:
            losses.append(loss)
            if len(losses) % (size["steps"] // 2) == 0:
                heldout.append(heldout_loss(partial(forward_of, model), size))
        part = max(1, size["steps"] // 20)
        yield {
            "case": f"Llama 0.9M on Shakespeare, {size['steps']:,} steps of {size['batch'] * size['tokens']} tokens",
            "way": way,
            "seed": 0,
            "size": size,
            "heldout_loss": heldout,
            "train_loss": [statistics.fmean(losses[i : i + part]) for i in range(0, len(losses), part)],
        }


def tuned_rows(smoke: bool, old: Rows, model: str | None, ways: Sequence[str] = WAYS) -> Iterator[Row]:
    """Fine-tuning runs of SmolLM2-135M, or of `model`, that are missing in `old`."""
    size = TUNED_SMOKE if smoke else TUNED
    done = {row["way"] for row in old if row["size"] == size}
    with tempfile.TemporaryDirectory() as cache:
        source = prepare_model(model, Path(cache))
        for way in (way for way in ways if way not in done):
            yield tuned_row(way, source, size)


def tuned_row(way: str, source: str, size: Row) -> Row:
    train, aside = data.split_plays(data.load_plays(), held_out=4, seed=0)
    model, tokenizer = load(source)
    fed = tokens_of(tokenizer, train, size["steps"] * size["batch"], size["tokens"]).split(size["batch"])
    seen = tokens_of(tokenizer, aside, size["heldout"], size["tokens"])
    before = loss_of(model, seen)
    rates = [size["rate"] * rate_at(step, SIZE | {"steps": size["steps"]}) for step in range(size["steps"])]
    losses = list(steps_of(way, model, fed, rates, 0.0, 1.0))
    return {
        "case": f"SmolLM2-135M on Shakespeare, {len(losses)} steps of {size['batch'] * size['tokens']} tokens",
        "way": way,
        "seed": 0,
        "size": size,
        "heldout_loss_before": before,
        "heldout_loss": loss_of(model, seen),
        "train_loss": statistics.fmean(losses[-max(1, len(losses) // 4) :]),
    }


def tokens_of(
    tokenizer: PreTrainedTokenizerBase, plays: dict[str, list[data.Speech]], count: int, tokens: int
) -> Tensor:
    """(count, tokens), of speeches end to end."""
    texts = data.sft_dataset(plays, size=count, tokens=tokens + tokens // 2, seed=0)["text"]
    ids = [i for text in texts for i in tokenizer(text)["input_ids"]]
    if len(ids) < count * tokens:
        raise ValueError(f"{len(ids)} tokens of {count * tokens}: there are too few speeches for so many steps")
    return torch.tensor(ids[: count * tokens]).view(count, tokens)


@torch.no_grad()
def loss_of(model: PreTrainedModel, ids: Tensor) -> float:
    model.eval()
    return statistics.fmean(forward_of(model, some).item() for some in ids.split(2))
