"""Costs of choices in loss, as far as they were measured: per cent of held-out loss, the mean of three seeds.

Each figure is of one change alone, on a small Llama, at tuned rates. tests/planner/test_losses.py makes them again from
the records (scripts/bench/records):

    STATES        a method with this codec against its fp32 states               optimizers.jsonl
    WEIGHTS       AdamW on bf16 weights, a store against fp32 masters,           weights.jsonl
                  continued training; the larger of two learning rates
    EMBEDDINGS    a rule of embedding and output head against Adam               embeddings.jsonl
    TIERS         what layers keep against HuggingFace's activations             activations.jsonl

Costs of several changes together were not measured, so they are added up, and what came out below zero counts as zero:
it is luck, not credit. Another rule in AdamW's place (APOLLO) is no part of the sum: rules were not compared on a model
that was trained before. What is not in a table was not measured.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Protocol

from hf_lowmem import specs
from hf_lowmem.optim import OPTIMIZERS
from hf_lowmem.training.arguments import LowMemArguments

__all__ = [
    "BOUND",
    "EMBEDDINGS",
    "STATES",
    "TIERS",
    "WEIGHTS",
    "embedding_rules",
    "is_accepted",
    "is_measured",
    "parts_of",
    "total",
]

BOUND = 0.5  # per cent of held-out loss: `lowmem="auto"` takes nothing that was measured to cost more

STATES: Mapping[tuple[str, str], float] = {
    ("adamw", "bf16"): -0.06,
    ("adamw", "int8"): 0.15,
    ("adamw", "int8_softsign"): -0.09,
    ("adamw", "fp8"): 0.20,
    ("adamw", "fp8_expand"): 0.08,
    ("adamw", "8bit"): 0.09,
    ("adamw", "int8,fp8_expand"): 0.14,
    ("adamw", "int4"): -0.22,
    ("adam_mini", "8bit"): -0.05,
    ("lion", "int8"): 0.07,
    ("lion", "int8_softsign"): 0.04,
    ("lion", "int4"): 0.35,
    ("lamb", "8bit"): 0.40,
    ("soap", "8bit"): -0.10,
    ("muon", "8bit"): -0.08,
    ("scale", "8bit"): 0.04,
    ("galore", "fp8_expand"): 0.14,
    ("galore", "8bit"): 0.13,
    ("fira", "8bit"): 0.15,
    ("apollo", "8bit"): 0.08,
    ("apollo", "int4"): -0.03,
    ("apollo_mini", "8bit"): -0.12,
    ("natural_galore", "8bit"): 0.10,
}
WEIGHTS: Mapping[str, float] = {"keep": 0.52, "bf16_sr": 0.00, "bf16_ecc": 0.00, "int8_sr": 0.00}
EMBEDDINGS: Mapping[tuple[str, str], float] = {("apollo_mini", "scale"): 0.24, ("apollo_mini", "adam_mini"): 0.48}
TIERS: Mapping[str, float] = {
    "exact": 0.00,
    "fp8": -0.01,
    "fp8_recompute": 0.02,
    "checkpoint_fp8": 0.18,
}
# Tiers that compute the same as another, to the bit.
SAME: Mapping[str, str] = {"stream": "exact", "stream_fp8": "checkpoint_fp8"}
PLAIN = ("adamw_torch", "adamw_torch_fused")  # of HuggingFace, whose states are as the weights are


class Settings(Protocol):
    """Part of a choice that has a cost here."""

    @property
    def optim(self) -> str: ...
    @property
    def state(self) -> str | None: ...
    @property
    def weights(self) -> str | None: ...
    @property
    def embeddings(self) -> str | None: ...


def is_measured(optim: str, state: str | None) -> bool:
    """Whether it is known what a codec costs a method of ours; fp32 is what others are compared with."""
    return state in (None, "fp32") or (optim, state) in STATES


def embedding_rules(optim: str) -> list[str]:
    """Rules of embedding and output head that were measured with a method, the cheapest in loss first."""
    return sorted((rule for method, rule in EMBEDDINGS if method == optim), key=lambda rule: EMBEDDINGS[optim, rule])


def parts_of(settings: Settings, tiers: Iterable[str], *, bf16_weights: bool) -> dict[str, float | None]:
    """Cost of each part of some settings; None where that was not measured, and no entry where there is none.

    Args:
        tiers: of the layers; the worst counts.
        bf16_weights: whether trained weights are bfloat16.
    """
    found: dict[str, float | None] = {}
    optim, state = settings.optim, settings.state
    if optim in OPTIMIZERS:
        if state not in (None, "fp32"):
            found[f"states {state}"] = STATES.get((optim, state))
    elif optim not in PLAIN:
        found[f"states of {optim}"] = None
    if bf16_weights:
        store = settings.weights or "keep"
        found[f"weights {store}"] = WEIGHTS.get(store)
    if settings.embeddings not in (None, "adam"):
        found[f"embeddings {settings.embeddings}"] = EMBEDDINGS.get((optim, settings.embeddings))
    ours = [tier for tier in dict.fromkeys(tiers) if tier.partition("/")[0] in (*specs.TIERS, *specs.STREAMED)]
    if ours:
        # Shared inputs of a tier that rounds are rounded otherwise, which was not measured.
        same = {tier: "stream" if tier.startswith("stream/") else tier for tier in ours}
        costs = {tier: TIERS.get(SAME.get(same[tier], tier)) for tier in ours}
        worst = max(ours, key=lambda tier: math.inf if (cost := costs[tier]) is None else cost)
        found[f"activations {worst}"] = costs[worst]
    return found


def is_accepted(settings: Settings, parts: Mapping[str, float | None], args: LowMemArguments) -> bool:
    """Whether `lowmem="auto"` may take a choice: nothing of it that the user left open was measured to cost more than
    BOUND, all together, or was not measured."""
    ours = str(getattr(args.optim, "value", args.optim)) in OPTIMIZERS or "optim" in args.lowmem_open
    chosen = {}
    for name, cost in parts.items():
        field = f"lowmem_{'state' if name.startswith('states') else name.split()[0]}"
        fixed = settings.optim not in OPTIMIZERS and not ours  # HuggingFace's stores belong to the optimizer
        if field in args.lowmem_open and not (fixed and field in ("lowmem_state", "lowmem_weights")):
            chosen[name] = cost
    cost = total(chosen)
    return cost is not None and cost <= BOUND


def total(parts: Mapping[str, float | None]) -> float | None:
    """The sum of what parts cost, without credit for luck; None where one was not measured."""
    if any(cost is None for cost in parts.values()):
        return None
    return round(sum(max(0.0, cost or 0.0) for cost in parts.values()), 4)
