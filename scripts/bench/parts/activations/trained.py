"""Parts error and loss: gradients of a trained model against float64, and what a tier does to a training."""

import copy
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hf_lowmem.specs import TIERS
from parts.activations.models import prepared
from parts.record import Row, Rows
from parts.small_llama import SIZE, SMOKE, batches, build_model, clip_, heldout_loss, rate_at

SIZE_5M = SIZE | {
    "hidden": 256,
    "intermediate": 704,
    "layers": 5,
    "vocabulary": 2048,
    "steps": 200,
    "batch": 4,
    "tokens": 128,
    "heldout_windows": 256,
}
SMOKE_5M = SMOKE
RATE = 3e-3
SEEDS = (0, 1, 2)


def gradients(model: nn.Module, ids: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def error_rows(smoke: bool, old: Rows) -> Iterator[Row]:
    """Relative error of each parameter's gradient against float64, as a norm, on text: worst and median parameter."""
    size = SMOKE_5M if smoke else SIZE_5M
    plain = build_model(size, 0, bf16=False)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    steps = 2 if smoke else 60  # gradients of trained weights, not of first ones
    draws = list(batches(size | {"steps": steps + 1}, 0))
    for ids in draws[:-1]:
        plain(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ids = draws[-1]
    truth_loss, truth = gradients(copy.deepcopy(plain).double(), ids)
    losses = {}
    for way in ("HuggingFace", *TIERS):
        model = prepared(way, copy.deepcopy(plain))
        losses[way], ours = gradients(model, ids)
        errors = {n: ((ours[n] - g).norm() / g.norm()).item() for n, g in truth.items()}
        worst = max(errors, key=lambda n: errors[n])
        whole = torch.cat([(ours[n] - g).flatten() for n, g in truth.items()]).norm()
        yield {
            "case": "Llama 5M, trained 60 steps",
            "way": way,
            "worst": errors[worst],
            "worst_parameter": worst,
            "median": statistics.median(errors.values()),
            "whole": (whole / torch.cat([g.flatten() for g in truth.values()]).norm()).item(),
            "loss_equal_to_huggingface": losses[way] == losses["HuggingFace"],
            "loss_float64": truth_loss,
        }


def loss_rows(smoke: bool, old: Rows) -> Iterator[Row]:
    """Train a Llama of five million parameters with AdamW, from the same weights on the same text."""
    size = SMOKE_5M if smoke else SIZE_5M
    done = {(row["way"], row["seed"]) for row in old if row["size"] == size}
    for seed in SEEDS[:1] if smoke else SEEDS:
        for way in ("HuggingFace", *TIERS):
            if (way, seed) not in done:
                yield loss_row(way, seed, size)


def loss_row(way: str, seed: int, size: dict[str, Any]) -> Row:
    model = prepared(way, build_model(size, seed, bf16=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=size["weight_decay"], fused=True)

    def forward(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, labels=ids).loss

    losses = []
    began = time.perf_counter()
    for step, ids in enumerate(batches(size, seed)):
        optimizer.param_groups[0]["lr"] = RATE * rate_at(step, size)
        loss = forward(ids)
        loss.backward()
        clip_(list(model.parameters()), size["clip"], bf16=False)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {
        "case": "Llama 5M on Shakespeare, 200 steps",
        "way": way,
        "seed": seed,
        "size": size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_loss": statistics.fmean(losses[-max(1, size["steps"] // 4) :]),
        "heldout_loss": heldout_loss(forward, size),
        "seconds": time.perf_counter() - began,
    }
