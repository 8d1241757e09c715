"""Step optimizer: one update over the weights of a 1B Llama, ours beside torch's fused AdamW and others' 8-bit ones.

bf16 weights and gradients, as on a card that is too small. Each optimizer is built, stepped and deleted alone: together
their states would not fit. `moved` is what a step must read and write at least: the gradient once, the weight and the
state twice. Time over it is the bandwidth that the step reaches.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from hf_lowmem.memory import optimizer_bytes
from hf_lowmem.optim import make_optimizer
from parts.gpu.steps import Case
from parts.gpu.timing import copy_bandwidth, device_and_host, free, peak_bytes
from parts.peers import PEERS, REFERENCE, Peer
from parts.record import Row

RATE = 1e-6
SIZE = {"width": 2048, "inner": 8192, "layers": 15, "vocabulary": 128256}
TOY = {"width": 64, "inner": 160, "layers": 1, "vocabulary": 256}

OURS: dict[str, dict[str, Any]] = {  # by how much somebody who has ten minutes wants to know
    "adamw 8bit, bf16_sr": {"name": "adamw", "state": "8bit", "weights": "bf16_sr"},
    "adamw 8bit": {"name": "adamw", "state": "8bit"},
    "apollo_mini 8bit": {"name": "apollo_mini", "state": "8bit"},
    "adamw int8": {"name": "adamw", "state": "int8"},
    "lion int8": {"name": "lion", "state": "int8"},
    "apollo 8bit": {"name": "apollo", "state": "8bit"},
    "adamw fp32": {"name": "adamw", "state": "fp32"},
    "adamw 8bit, bf16_ecc": {"name": "adamw", "state": "8bit", "weights": "bf16_ecc"},
    "adamw fp8_expand": {"name": "adamw", "state": "fp8_expand"},
    "galore 8bit": {"name": "galore", "state": "8bit", "projection": "subspace"},
}


THEIRS = (
    "torch AdamW foreach",
    "bitsandbytes AdamW8bit",
    "bitsandbytes Lion8bit",
    "torchao AdamW8bit",
    "torchao AdamWFp8",
    "FlashOptim FlashAdamW",
)


class Weights(nn.Module):
    """The parameters of a Llama; it computes nothing."""

    def __init__(self, size: dict[str, int], device: torch.device) -> None:
        super().__init__()
        width, inner = size["width"], size["inner"]
        self.embedding = nn.Embedding(size["vocabulary"], width, device="meta")
        self.layers = nn.ModuleList()
        for _ in range(size["layers"]):
            shapes = [(width, width), (width // 4, width), (width // 4, width), (width, width)]
            shapes += [(inner, width), (inner, width), (width, inner)]
            linears = [nn.Linear(b, a, bias=False, device="meta") for a, b in shapes]
            self.layers.append(nn.ModuleList([*linears, *(nn.RMSNorm(width, device="meta") for _ in range(2))]))
        self.to(torch.bfloat16).to_empty(device=device)
        draw = torch.Generator(device).manual_seed(0)
        for p in self.parameters():
            p.data.normal_(std=0.02, generator=draw)
            p.grad = torch.empty_like(p).normal_(std=1e-3, generator=draw)


def build_theirs(peer: Peer) -> Callable[[nn.Module], Optimizer]:
    return lambda model: peer.load()(model.parameters(), lr=RATE)


def build_ours(spec: dict[str, Any]) -> Callable[[nn.Module], Optimizer]:
    return lambda model: make_optimizer(model=model, lr=RATE, **spec)


def measure(
    build: Callable[[nn.Module], Optimizer],
    size: dict[str, int],
    device: torch.device,
    roof: Callable[[], float],
    repeats: int,
) -> Row:
    model = Weights(size, device)
    optimizer = build(model)
    optimizer.step()  # the state is allocated
    state = optimizer_bytes(optimizer)
    free(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    seconds, host = device_and_host(optimizer.step, device, repeats=repeats)
    count = sum(p.numel() for p in model.parameters())
    moved = 3 * sum(p.numel() * p.itemsize for p in model.parameters()) + 2 * state
    peak = peak_bytes(device)
    return {
        "parameters": count,
        "state_bytes": state,
        "state_bytes_per_parameter": state / count,
        "moved": moved,
        "seconds": seconds,
        "host_seconds": host,
        "bandwidth": moved / seconds,
        "of_copy_bandwidth": moved / seconds / roof(),
        "temporary_bytes": None if peak is None else peak - before,
    }


def cases(device: torch.device, toy: bool, theirs: bool) -> Iterator[Case]:
    """Torch's optimizers and ours, the most wanted first; with `theirs`, those of other packages."""
    size, repeats = (TOY, 1) if toy else (SIZE, 8)
    roof = functools.cache(lambda: copy_bandwidth(device, 1 << (16 if toy else 31)))
    builds = {name: build_theirs(PEERS[name]) for name in (THEIRS if theirs else (REFERENCE,))}
    if not theirs:
        builds |= {name: build_ours(spec) for name, spec in OURS.items()}
    for name, build in builds.items():
        yield Case({"setting": name}, lambda b=build: measure(b, size, device, roof, repeats), theirs=theirs)
