"""The space of a search: every valid combination of the settings that the user left open.

A field is open where it had its class's default when the arguments were made (`LowMemArguments.lowmem_open`); any
other is the user's, and is never changed. Open are, each if its fields are:

    micro-batches       per_device_train_batch_size × gradient_accumulation_steps at their product, if both are open
    activations         as HuggingFace keeps them, gradient_checkpointing, the tiers, and mixtures of two by layer
    optim               the default first, then adamw, apollo, apollo_mini
    lowmem_state        fp32, bf16, 8bit, int4, with an optim of ours; where that is open too, those whose cost in loss
                        was measured (`losses`)
    lowmem_weights      of bf16 weights, bf16_sr and bf16_ecc: rounding to nearest (keep) loses small updates; int8_sr,
                        with step in backward, where a whole model is trained in one process
    lowmem_embeddings   the rules whose cost in loss was measured with the optim (apollo_mini), the cheapest first
    step in backward    where max_grad_norm is 0; or open, and the rule limits growth itself (apollo, apollo_mini, fira)

Which of them go together, LowMemArguments' own checks decide: a combination that they refuse is no candidate.

Not searched: TRL's activation_offloading, because a plan cannot weigh it without a CUDA device's streams; the rank of
a low-rank optim; the dtype; the number of processes.

A mixture gives its first layers the smaller tier. Backward begins at the last layer, so by the time that the smaller
tier computes its layers again, what the others kept is freed.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import combinations, product
from typing import Any

from hf_lowmem import rules
from hf_lowmem.optim import OPTIMIZERS
from hf_lowmem.planner.search.losses import embedding_rules, is_measured
from hf_lowmem.specs import STORES_AT_REST, TIERS, WEIGHT_STORES, ActivationSpec

__all__ = ["AS_IS", "CHECKPOINTING", "Choice", "candidates", "layers_by_tier", "policy_fields"]

# Activation policies that are no tier of ours.
AS_IS = "as is"
CHECKPOINTING = "gradient_checkpointing"
# From the largest to the smallest; hooks_fp8, for layers that are not recognised, saves too little to be searched.
SEARCHED_TIERS = tuple(tier for tier in TIERS if tier != "hooks_fp8")
SHARES = 8  # a mixture changes its tier after so many eighths of the layers

RULES = ("adamw", "apollo", "apollo_mini")
STATES = ("fp32", "bf16", "8bit", "int4")
# A 4-bit state errs by 15 to 30 % of an update, an 8-bit one by 1 to 2 % (records/codecs.jsonl).
COARSE = ("int4",)
# Rounding to the nearest loses small updates.
STORES = tuple(store for store in WEIGHT_STORES if store != "keep")
APART = 64  # departures of two rules are further from each other than those of one rule's forms


@dataclass(frozen=True)
class Choice:
    """One combination. departure: how far it is from what the user asked for, 0 first: by another rule, for each rule
    by dropping max_grad_norm, then by states that are coarse or were not measured, then by weights at rest in int8, and
    last by another rule for embedding and output head, in the order of what these were measured to cost.

    activations: AS_IS, CHECKPOINTING, a tier, or a mixture as `lowmem_activations` writes it.
    """

    departure: int
    batch: int
    accumulation: int
    activations: str
    optim: str
    state: str | None = None
    weights: str | None = None
    step_in_backward: bool = False
    max_grad_norm: float = 1.0
    embeddings: str | None = None

    @cached_property
    def values(self) -> dict[str, Any]:
        """The combination as values of the arguments' fields."""
        return {
            "per_device_train_batch_size": self.batch,
            "gradient_accumulation_steps": self.accumulation,
            **policy_fields(self.activations),
            "optim": self.optim,
            "lowmem_state": self.state,
            "lowmem_weights": self.weights,
            "lowmem_embeddings": self.embeddings,
            "lowmem_step_in_backward": self.step_in_backward,
            "max_grad_norm": self.max_grad_norm,
        }

    def changes(self, args: Any) -> dict[str, Any]:
        """The fields that this choice sets otherwise than `args` have them."""
        found = {name: value for name, value in self.values.items() if getattr(args, name) != value}
        if "gradient_checkpointing" in found:  # None: a tier turns it off by itself
            found["gradient_checkpointing"] = bool(found["gradient_checkpointing"])
        return {name: value for name, value in found.items() if getattr(args, name) != value}


def policy_fields(activations: str) -> dict[str, Any]:
    """An activation policy as values of fields."""
    if activations in (AS_IS, CHECKPOINTING):
        return {"gradient_checkpointing": activations == CHECKPOINTING, "lowmem_activations": None}
    return {"gradient_checkpointing": None, "lowmem_activations": activations}


@cache
def layers_by_tier(activations: str, depth: int) -> tuple[str, ...]:
    """The policy of each of `depth` layers; a layer that no range names is as HuggingFace made it.

    Raises:
        ValueError: where a range names a layer that there is not.
    """
    if activations in (AS_IS, CHECKPOINTING):
        return (activations,) * depth
    spec = ActivationSpec(tiers=activations, labels={"tiers": "lowmem_activations"})
    named = zip(spec.of_layers(depth), spec.every_of_layers(depth), strict=True)
    return tuple(AS_IS if tier is None else tier if every == 1 else f"{tier}/{every}" for tier, every in named)


def candidates(
    args: Any,
    *,
    depth: int,
    bf16_weights: bool,
    can_rest: bool = False,
    world_size: int = 1,
    parallel: str | None = None,
) -> list[Choice]:
    """All valid combinations.

    Args:
        depth: decoder layers.
        bf16_weights: whether trained weights are bfloat16.
        can_rest: whether some of them can be at rest in int8.
        world_size, parallel: as for `plan`.
    """
    policies = list(_policies(args))
    found = []
    for batch, accumulation in _micro_batches(args):
        for rule in _rules(args, bf16_weights, can_rest):
            for policy in policies:
                choice = Choice(batch=batch, accumulation=accumulation, activations=policy, **rule)
                with contextlib.suppress(TypeError, ValueError):
                    # As if it had been chosen by hand: rules wait for a search as long as there is to be one.
                    made = args.lowmem_replace(**choice.values, lowmem_budget=None, lowmem=None)
                    rules.check(rules.Run.from_arguments(made).with_plan(world_size, parallel))
                    found.append(choice)
    return found + list(_mixtures(found, args, depth))


def _divisors(n: int) -> list[int]:
    return [d for d in range(n, 0, -1) if n % d == 0]


def _micro_batches(args: Any) -> list[tuple[int, int]]:
    batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if {"per_device_train_batch_size", "gradient_accumulation_steps"} <= args.lowmem_open:
        rows = batch * accumulation
        return [(d, rows // d) for d in _divisors(rows)]
    return [(batch, accumulation)]


def _policies(args: Any) -> Iterator[str]:
    """Policies that treat all layers the same."""
    free = {"gradient_checkpointing", "activation_checkpointing"} & set(vars(args)) <= args.lowmem_open
    if "lowmem_activations" not in args.lowmem_open:
        # Settled by an earlier search, perhaps to no tier.
        yield args.lowmem_activations or (CHECKPOINTING if args.gradient_checkpointing else AS_IS)
        return
    if free:
        yield from (AS_IS, CHECKPOINTING)
    else:
        yield CHECKPOINTING if args.gradient_checkpointing else AS_IS
    if free or not args.gradient_checkpointing:
        yield from SEARCHED_TIERS


def _mixtures(found: list[Choice], args: Any, depth: int) -> Iterator[Choice]:
    """Mixtures of two valid policies; the boundary moves in eighths of the depth."""
    if "lowmem_activations" not in args.lowmem_open:
        return
    order = (AS_IS, *SEARCHED_TIERS)
    by_rest: dict[Choice, dict[str, Choice]] = {}
    for choice in found:
        by_rest.setdefault(replace(choice, activations=""), {})[choice.activations] = choice
    cuts = sorted({round(depth * share / SHARES) for share in range(1, SHARES)} - {0, depth})
    for valid in by_rest.values():
        for larger, smaller in combinations([p for p in order if p in valid], 2):
            for cut in cuts:
                parts = [f"{smaller}:0-{cut - 1}" if cut > 1 else f"{smaller}:0"]
                parts += [] if larger == AS_IS else [f"{larger}:{cut}-"]
                yield replace(valid[smaller], activations=",".join(parts))


def _rules(args: Any, bf16_weights: bool, can_rest: bool) -> Iterator[dict[str, Any]]:
    """Optimizers with their stores and the way of stepping, in the order of departure."""
    free = args.lowmem_open
    own = str(getattr(args.optim, "value", args.optim))
    if own not in OPTIMIZERS:
        yield {"departure": 0, "optim": own, "max_grad_norm": args.max_grad_norm}
        if "optim" not in free:
            return
    names = (own,) if own in OPTIMIZERS else RULES
    stores = (args.lowmem_weights,)
    if "lowmem_weights" in free:
        stores = (*STORES, *(STORES_AT_REST if can_rest else ())) if bf16_weights else (None,)
    stepping = (True, False) if "lowmem_step_in_backward" in free else (args.lowmem_step_in_backward,)
    for i, name in enumerate(names):
        states = STATES if "lowmem_state" in free else (args.lowmem_state,)
        if own not in OPTIMIZERS:  # what the user has not named is not tried without having been measured
            states = tuple(state for state in states if is_measured(name, state))
        rules = (args.lowmem_embeddings,)
        if "lowmem_embeddings" in free:
            rules = (None, *embedding_rules(name))
        for state, store, steps, (nth, rule) in product(states, stores, stepping, list(enumerate(rules))):
            if store in STORES_AT_REST and not steps:
                continue
            norm = args.max_grad_norm
            if steps and "max_grad_norm" in free and "prev_norm" in OPTIMIZERS[name].STATES:
                norm = 0.0
            coarse = state in COARSE or not is_measured(name, state)
            yield {
                "departure": 1
                + APART * i
                + (norm != args.max_grad_norm)
                + 2 * coarse
                + 4 * (store in STORES_AT_REST)
                + 8 * nth,
                "optim": name,
                "state": state,
                "weights": store,
                "step_in_backward": steps,
                "max_grad_norm": norm,
                "embeddings": rule,
            }
