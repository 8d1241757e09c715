"""Texts of a search: what was chosen and why, what would have been faster, or that nothing fits."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_lowmem.memory import human_bytes
from hf_lowmem.optim import OPTIMIZERS
from hf_lowmem.planner.search.space import Choice
from hf_lowmem.planner.simulate import Plan

__all__ = ["Answer", "NothingFits", "assumed", "describe", "explain", "in_loss", "rate_of"]


class NothingFits(ValueError):
    """No combination is within the budget. chosen, plan: of the smallest; candidates, seconds: of the search."""

    def __init__(self, message: str, *, chosen: dict[str, Any], plan: Plan, candidates: int, seconds: float) -> None:
        super().__init__(message)
        self.chosen, self.plan, self.candidates, self.seconds = chosen, plan, candidates, seconds


def describe(values: Mapping[str, Any]) -> str:
    """Fields and their values."""
    return ", ".join(f"{name}={value!r}" for name, value in values.items()) or "the settings as they are"


def assumed(plan: Plan) -> str:
    """Assumptions of a plan, in words: the batch, the weights, the optimizer, where it runs."""
    of = plan.settings
    batch = f"{of['sequences']} × {of['tokens']:,} tokens"
    if of["gradient_accumulation_steps"] > 1:
        batch += f" × {of['gradient_accumulation_steps']} micro-batches"
    kept = "checkpointing" if of["gradient_checkpointing"] else of["lowmem"].get("lowmem_activations")
    where = "a GPU" if of["device"] == "cuda" else "a CPU"
    several = f", {of['world_size']} processes ({of['parallel']})" if of["parallel"] else ""
    return (
        f"a step of {batch}, weights in {of['dtype']}, optim={of['optim']}, {kept or 'no checkpointing'}, on {where}"
        f"{several}"
    )


def in_loss(losses: Mapping[str, float | None]) -> str:
    """Costs of parts in loss, each with its figure."""
    if not losses:
        return "nothing of it changes what is computed"
    said = [f"{name} {'not measured' if cost is None else f'{cost:+.2f} %'}" for name, cost in losses.items()]
    return ", ".join(said) + " (each measured alone, on a small Llama)"


def rate_of(optim: str) -> str | None:
    """Advice on the learning rate of an optimizer that scales its update; None for one that does not."""
    scale = getattr(OPTIMIZERS.get(optim), "DEFAULTS", {}).get("scale")
    if scale is None:
        return None
    return (
        f"{optim} multiplies updates by the root of lowmem_scale, which is {scale:g} by default: tune learning_rate × "
        f"{math.sqrt(scale):.3g}, about AdamW's rate to begin with"
    )


@dataclass(frozen=True)
class Answer:
    """An answer before it is put into words.

    Args:
        budget: in bytes.
        choice: what was chosen; `chosen` are the fields that it sets, `plan` is its plan.
        following: the nearest of what was preferred; see `Found.next`.
        least: the least that each optimizer needs which was preferred and does not fit.
        count: of combinations.
        args: as they were before.
        refused: activation policies that are no choice on this model, and why.
        losses: costs of parts of the choice; see `losses.parts_of`.
        first: whether nothing was preferred to it.
    """

    budget: int
    choice: Choice
    chosen: Mapping[str, Any]
    plan: Plan
    following: Mapping[str, Any] | None
    least: Mapping[str, int]
    count: int
    args: Any
    refused: Mapping[str, Exception]
    losses: Mapping[str, float | None]
    first: bool


def explain(answer: Answer) -> str:
    """Sentences, one a line."""
    choice, chosen, plan, args, following = answer.choice, answer.chosen, answer.plan, answer.args, answer.following
    lines = [
        f"Chosen: {describe(chosen)}.",
        f"It needs {human_bytes(plan.reserved_bytes)} of {human_bytes(answer.budget)}, at its highest in {plan.phase}, "
        f"and of {answer.count:,} combinations is the fastest that fits, by a cost model of a nominal device, in the "
        "order of optimizers.",
        f"Assumed: {assumed(plan)}.",
        f"In loss: {in_loss(answer.losses)}.",
    ]
    for name, size in answer.least.items():
        lines.append(f"optim={name!r} was preferred, but needs at least {human_bytes(size)}.")
    if choice.optim != str(getattr(args.optim, "value", args.optim)) and (why := rate_of(choice.optim)):
        lines.append(f"learning_rate={args.learning_rate!r} was not changed: {why}.")
    if "max_grad_norm" in chosen:
        lines.append(
            f"max_grad_norm={args.max_grad_norm!r} was set to 0, as step in backward needs; {choice.optim} limits the "
            "growth of each update by itself."
        )
    if answer.first:
        lines.append("There is nothing faster among your settings: they fit without giving anything up.")
    elif following is not None:
        how = "needs" if following["planned"] else "is estimated to need"
        lines.append(
            f"Next to be preferred, at {following['time']:.3f} of its time: {describe(following['chosen'])}; it {how} "
            f"{human_bytes(following['reserved_bytes'])}."
        )
    lines += [f"Left out: activations {policy}. {reason}" for policy, reason in answer.refused.items()]
    return "\n".join(lines)
