"""One run of the quality part, of `parts.small_llama`.

Everything but the setting is held still. The runs of one seed differ in nothing but the setting, and a codec is judged
by the difference to the same method's fp32 state at the same seed: that difference varies far less than the loss does
from seed to seed.

**bf16 weights** are computed with in fp32: every weight is read as bf16 and widened before the forward pass. bf16
matrix products are slow on a CPU and would add a rounding of their own, equal in all four ways. The ways differ in what
the optimizer keeps: "masters" steps fp32 weights, which the forward pass sees rounded to bf16; "keep", "bf16_sr" and
"bf16_ecc" have bf16 parameters and that `weights=` of `make_optimizer`. Gradients are rounded to bf16 in all four.
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_lowmem.memory import optimizer_bytes
from hf_lowmem.optim import LowMemOptimizer, make_optimizer
from parts.optimizers.settings import Setting
from parts.record import Row
from parts.small_llama import SIZE, batches, build_model, clip_, heldout_loss, rate_at

LONG = SIZE | {"plays": 33, "steps": 5000}


def configuration(setting: Setting, *, rate: float, seed: int, size: dict[str, Any]) -> dict[str, Any]:
    """All that decides a run's result, in plain values; its JSON is the key under which the run is recorded."""
    return {
        "method": setting.method,
        "state": setting.state,
        "options": setting.options,
        "weights": setting.weights,
        "control": setting.control,
        "lr": float(f"{rate:.6g}"),
        "seed": seed,
        "size": size,
    }


def key(config: dict[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)


def build_optimizer(setting: Setting, model: nn.Module, *, rate: float, seed: int, decay: float) -> LowMemOptimizer:
    weights = setting.weights if setting.weights not in ("fp32", "masters") else "keep"
    return make_optimizer(
        setting.method,
        model,
        lr=rate,
        weight_decay=decay,
        state=setting.state,
        weights=weights,
        seed=seed,
        **setting.options,
    )


def unavailable(setting: Setting, size: dict[str, Any]) -> str | None:
    """Why `setting` cannot be built here; None when it can."""
    model = build_model(size, 0, bf16=setting.weights not in ("fp32", "masters"))
    try:
        build_optimizer(setting, model, rate=1e-3, seed=0, decay=0.0)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def forward_of(model: nn.Module, weights: str) -> Callable[[Tensor], Tensor]:
    """ids → mean next-byte loss, the weights seen as the store `weights` says."""
    if weights == "fp32":
        return lambda ids: model(input_ids=ids, labels=ids).loss

    def forward(ids: Tensor) -> Tensor:
        seen = {name: p.to(torch.bfloat16).to(torch.float32) for name, p in model.named_parameters()}
        return functional_call(model, seen, kwargs={"input_ids": ids, "labels": ids}).loss

    return forward


def run(setting: Setting, *, rate: float, seed: int, size: dict[str, Any]) -> Row:
    """Train once; the row of the record. A loss that is not finite is recorded as None."""
    began, used = time.perf_counter(), time.process_time()
    bf16 = setting.weights != "fp32"
    model = build_model(size, seed, bf16=bf16 and setting.weights != "masters", control=setting.control)
    parameters = list(model.parameters())
    optimizer = build_optimizer(setting, model, rate=rate, seed=seed, decay=size["weight_decay"])
    forward = forward_of(model, setting.weights)
    peaks = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for step, ids in enumerate(batches(size, seed)):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rate_at(step, size)
        loss = forward(ids)
        loss.backward()
        clip_(parameters, size["clip"], bf16=bf16)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    heldout = heldout_loss(forward, size)
    count = sum(p.numel() for p in parameters)
    train = statistics.fmean(losses[-max(1, size["steps"] // 4) :])
    return configuration(setting, rate=rate, seed=seed, size=size) | {
        "setting": setting.name,
        "codecs": sorted({group["state"] for group in optimizer.param_groups}),  # what "8bit" stood for
        "parameters": count,
        "state_bytes_per_parameter": optimizer_bytes(optimizer) / count,
        "weight_bytes_per_parameter": sum(p.nbytes for p in parameters) / count,
        "train_loss": train if math.isfinite(train) else None,
        "heldout_loss": heldout if math.isfinite(heldout) else None,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - used,
    }
