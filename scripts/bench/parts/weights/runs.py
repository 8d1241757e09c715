"""One training of the small Llama with one store of its weights.

All computes in bf16, as training in bf16 does, with a step in backward, which int8_sr needs and the others have for the
same numbers. Ways of keeping weights:

    masters     fp32 weights are stepped, and seen as bf16 by forward and backward
    control     the same, from first weights that differ by 2**-20: what a difference of nothing comes to
    keep, bf16_sr, bf16_ecc, int8_sr        bf16 weights and the `weights=` of make_optimizer

Kinds of run: "nothing" trains a fresh model; "continued" trains on what fp32 masters have made of that seed's, at a
lower rate, as fine-tuning does.
"""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_lowmem.memory import optimizer_bytes, parameter_bytes
from hf_lowmem.optim import StepInBackward, make_optimizer
from parts.record import Row
from parts.small_llama import batches, build_model, heldout_loss, rate_at

STORES = ("masters", "control", "keep", "bf16_sr", "bf16_ecc", "int8_sr")
# The best rate of each method with fp32 states, records/optimizers.jsonl.
TUNED = {"adamw": 0.01, "apollo_mini": 0.01, "apollo": 0.03, "scale": 0.003, "muon": 0.01, "adam_mini": 0.003}
METHODS = tuple(TUNED)
BASE_RATE = TUNED["adamw"]  # of the runs that others continue
# Parts of the tuned rate. At a third most updates of adamw are below half a bf16 unit; at a hundredth nearly all are.
SHARES = {"nothing": (3,), "continued": (10, 100)}
LOWEST = ("adamw", "apollo_mini")  # the methods that are run at a hundredth too
STEPS = 150


class Job(NamedTuple):
    """All that decides a run."""

    kind: str
    method: str
    store: str
    rate: float
    seed: int

    def row(self) -> Row:
        return self._asdict()


def rates_of(kind: str, method: str) -> tuple[float, ...]:
    """Learning rates at which a method is run."""
    shares = SHARES[kind] if method in LOWEST else SHARES[kind][:1]
    return tuple(float(f"{TUNED[method] / share:.3g}") for share in shares)


def forward_of(model: nn.Module, store: str) -> Callable[[Tensor], Tensor]:
    """ids → loss, computed in bf16."""
    if store not in ("masters", "control"):
        return lambda ids: model(input_ids=ids, labels=ids).loss

    def forward(ids: Tensor) -> Tensor:
        seen = {name: p.to(torch.bfloat16) for name, p in model.named_parameters()}
        return functional_call(model, seen, kwargs={"input_ids": ids, "labels": ids}).loss

    return forward


def trained(model: nn.Module, job: Job, size: Row, data_seed: int) -> tuple[Callable[[Tensor], Tensor], int]:
    """Train in place; the forward pass of what came out, and bytes of the optimizer's state."""
    weights = "keep" if job.store in ("masters", "control") else job.store
    optimizer = make_optimizer(
        job.method, model, lr=job.rate, weight_decay=size["weight_decay"], state="8bit", weights=weights, seed=job.seed
    )
    stepping, forward = StepInBackward(optimizer), forward_of(model, job.store)
    for step, ids in enumerate(batches(size, data_seed)):
        for group in optimizer.param_groups:
            group["lr"] = job.rate * rate_at(step, size)
        forward(ids).backward()
        optimizer.step()
    stepping.remove()
    return forward, optimizer_bytes(optimizer)


@functools.cache
def base_of(seed: int, size: tuple[tuple[str, float], ...]) -> dict[str, Tensor]:
    """The weights, fp32, that a seed's runs of "continued" begin with."""
    sizes = dict(size)
    model = build_model(sizes, seed, bf16=False)
    trained(model, Job("nothing", "adamw", "masters", BASE_RATE, seed), sizes, seed)
    return {name: value.clone() for name, value in model.state_dict().items()}


def run(job: Job, size: Row) -> Row:
    """Train once; the row of the record."""
    began = time.process_time()
    model = build_model(size, job.seed, bf16=False, control=job.store == "control")
    data_seed = job.seed
    if job.kind == "continued":
        noise = 1 + 2.0**-20 * torch.randn((), generator=torch.Generator().manual_seed(job.seed))
        base = base_of(job.seed, tuple(size.items()))
        model.load_state_dict({n: v * noise if job.store == "control" else v for n, v in base.items()})
        data_seed += 1000
    if job.store not in ("masters", "control"):
        for p in model.parameters():
            p.data = p.data.to(torch.bfloat16)
    forward, states = trained(model, job, size, data_seed)
    count = sum(p.numel() for p in model.parameters())
    return job.row() | {
        "heldout_loss": heldout_loss(forward, size),
        "weight_bytes_per_parameter": parameter_bytes(model) / count,
        "state_bytes_per_parameter": states / count,
        "steps": size["steps"],
        "parameters": count,
        "cpu_seconds": time.process_time() - began,
    }
