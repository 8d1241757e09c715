"""Parts bytes and time: what one layer keeps for backward, and how long forward and backward take.

A unit U is tokens × hidden × 2 bytes: one bf16 tensor of the residual stream.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._functorch import config as functorch_config

from hf_lowmem.activations import undo
from hf_lowmem.memory import measure_saved
from hf_lowmem.specs import TIERS
from parts.activations.models import HIDDEN, SHAPES, TOKENS, build, lora, prepared
from parts.record import Row, Rows

BUDGETS = (1.0, 0.5, 0.25)  # of torch.compile's partitioner: 1 keeps all that recomputing would cost anything


@contextmanager
def budget_of(way: str) -> Iterator[None]:
    """The memory budget of torch.compile's partitioner while "compile 0.5" and the like are measured."""
    before = functorch_config.activation_memory_budget
    functorch_config.activation_memory_budget = float(way.split()[1]) if way.startswith("compile") else before
    try:
        yield
    finally:
        functorch_config.activation_memory_budget = before
        torch._dynamo.reset()


def kept_by(way: str, family: str, shape: dict[str, Any], hidden: int, tokens: int, *, adapters: bool) -> float:
    """Bytes that one layer keeps: the difference between a model of three layers and one of two."""
    found = []
    for layers in (2, 3):
        model = build(family, shape, layers=layers, hidden=hidden, tokens=tokens, dtype=torch.bfloat16)
        model = prepared(way, lora(model) if adapters else model)
        ids = torch.randint(3, 256, (2, tokens // 2), generator=torch.Generator().manual_seed(0))
        with budget_of(way), measure_saved(model) as saved:
            output = model(input_ids=ids)
            found.append(saved.total)
            del output
    return found[1] - found[0]


def bytes_rows(smoke: bool, old: Rows) -> Iterator[Row]:
    hidden, tokens = (64, 64) if smoke else (HIDDEN, TOKENS)
    names = ["Llama-3-8B"] if smoke else [*SHAPES]
    for name in names:
        family, shape = SHAPES[name]
        compiled = [f"compile {b}" for b in BUDGETS] if name.startswith("Llama") and not smoke else []
        for way in ("HuggingFace", "checkpointing", *compiled, *TIERS):
            size = kept_by(way, family, shape, hidden, tokens, adapters=False)
            yield {"case": name, "way": way, "units": size / (hidden * tokens * 2)}
    for way in ("HuggingFace", *TIERS):
        size = kept_by(way, *SHAPES["Llama-2-7B"], hidden, tokens, adapters=True)
        yield {"case": "Llama-2-7B, LoRA", "way": way, "units": size / (hidden * tokens * 2)}
    yield {"case": "Llama-3-8B", "way": "TRL activation_offloading", "units": None, "why": "needs a CUDA device"}


def time_rows(smoke: bool, old: Rows) -> Iterator[Row]:
    """Forward and backward of a whole model, as ratios to HuggingFace's; interleaved, medians."""
    hidden, tokens, repeats = (64, 64, 2) if smoke else (HIDDEN, TOKENS, 9)
    family, shape = SHAPES["Llama-3-8B"]
    ids = torch.randint(3, 256, (2, tokens // 2), generator=torch.Generator().manual_seed(0))
    model = build(family, shape, layers=4, hidden=hidden, tokens=tokens, dtype=torch.float32)
    ways = ("HuggingFace", "checkpointing", *TIERS)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(repeats + 1):
        for way in ways:
            prepared(way, model)
            began = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            if repeat:  # the first warms up
                seconds[way].append(time.perf_counter() - began)
            model.zero_grad()
            undo(model)
            model.gradient_checkpointing_disable()
    base = statistics.median(seconds["HuggingFace"])
    for way in ways:
        ratios = [a / b for a, b in zip(seconds[way], seconds["HuggingFace"], strict=True)]
        yield {
            "case": "Llama-3-8B shape, hidden 512, 4 layers, fp32, forward and backward",
            "way": way,
            "ratio": statistics.median(seconds[way]) / base,
            "ratio_of_pairs": statistics.median(ratios),
            "repeats": repeats,
        }
