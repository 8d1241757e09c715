"""Loss of the small Llama trained with products in 8 bits, beside bf16, on the same weights and text."""

import statistics
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_lowmem.activations.linears import linears_of_layers
from hf_lowmem.matmul import OwnedProducts
from hf_lowmem.matmul.spec import MatmulSpec
from parts.record import Row, Rows
from parts.small_llama import SIZE, SMOKE, batches, build_model, clip_, heldout_loss, rate_at

SEEDS = (0, 1, 2)
WAYS = ("bf16", "fp8_row", "int8_row", "fp8_tensor")
RATE = 3e-3


def loss_rows(
    smoke: bool, old: Rows, *, steps: int, ways: Sequence[str] = WAYS, seeds: Sequence[int] = SEEDS
) -> Iterator[Row]:
    """Runs that are missing in `old`, of AdamW on fp32 weights under autocast to bf16."""
    size = SMOKE if smoke else SIZE | {"steps": steps}
    done = {(row["way"], row["seed"]) for row in old if row["size"] == size}
    for seed in seeds[:1] if smoke else seeds:
        for way in ways:
            if (way, seed) not in done:
                yield loss_row(way, seed, size)


def loss_row(way: str, seed: int, size: Row) -> Row:
    model = build_model(size, seed, bf16=False)
    model.train()
    products = None
    if way != "bf16":
        products = OwnedProducts(linears_of_layers(model), MatmulSpec(recipe=way, least=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=size["weight_decay"], fused=True)

    def forward(ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(input_ids=ids, labels=ids).loss

    losses: list[float] = []
    began = time.perf_counter()
    for step, ids in enumerate(batches(size, seed)):
        optimizer.param_groups[0]["lr"] = RATE * rate_at(step, size)
        loss = forward(ids)
        loss.backward()
        clip_(list(model.parameters()), size["clip"], bf16=False)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    seconds = time.perf_counter() - began
    if products is not None:
        products.take_off()
    return {
        "case": f"Llama 0.9M on Shakespeare, {len(losses)} steps",
        "way": way,
        "seed": seed,
        "size": size,
        "train_loss": statistics.fmean(losses[-max(1, len(losses) // 4) :]),
        "heldout_loss": heldout_loss(forward, size),  # of the plain products: of the model that would be saved
        "seconds": seconds,
    }
