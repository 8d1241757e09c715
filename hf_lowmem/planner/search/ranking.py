"""Candidates in their order, and what is known of what they need: `Search`, which answers `search` and `longest`."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hf_lowmem.memory import human_bytes
from hf_lowmem.optim import OPTIMIZERS
from hf_lowmem.planner.allocations import CannotSimulate
from hf_lowmem.planner.search.cost import Work, cost_a_token
from hf_lowmem.planner.search.estimate import Estimator
from hf_lowmem.planner.search.explain import NothingFits, describe, explain
from hf_lowmem.planner.search.space import Choice, layers_by_tier
from hf_lowmem.planner.simulate import Plan

__all__ = ["STEP", "Found", "Search"]

MOST_PLANS = 6  # of one length; the answer itself is planned in any case
STEP = 64  # tokens: lengths are multiples of it
POOL = 64  # combinations that may be the smallest at some length: those that are so at the shortest or the longest


@dataclass(frozen=True)
class Found:
    """The answer of a search.

    args:    a copy of the arguments with the choice in it
    chosen:  the fields that it sets otherwise than the arguments had them
    plan:    of the choice; `plan.reserved_bytes` is within the budget
    why:     sentences
    next:    of what would have been preferred, that which came nearest: its settings, reserved_bytes, whether these
             were planned or are an estimate, and time, its cost as a part of the choice's. None: nothing was preferred
    candidates, simulated, planned: numbers of combinations, of simulations for the estimates, and of whole plans
    """

    budget: int
    args: Any
    chosen: dict[str, Any]
    plan: Plan
    why: str
    next: dict[str, Any] | None
    candidates: int
    simulated: int
    planned: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: the plan's and the search's."""
        own = {k: v for k, v in vars(self).items() if k not in ("args", "plan")}
        return {**self.plan.to_dict(), **own, "max_length": self.args.max_length}

    def __str__(self) -> str:
        return f"{self.plan}\n\n{self.why}"


@dataclass
class Search:
    """One model and its candidates, and what is known of them. Several budgets may be asked for, one after another."""

    estimator: Estimator
    make_plan: Callable[[Any], Plan]
    found: list[Choice]
    began: float
    budget: int = 0
    label: str = ""
    plans: dict[tuple[Choice, int], Plan] = field(default_factory=dict)
    errors: dict[tuple[Any, ...], int] = field(default_factory=dict)
    refused: dict[str, Exception] = field(default_factory=dict)  # activation policies, and why
    _estimates: dict[tuple[Choice, int], int | None] = field(default_factory=dict)

    @property
    def args(self) -> Any:
        return self.estimator.args

    def estimate(self, choice: Choice, tokens: int) -> int | None:
        key = choice, tokens
        if key not in self._estimates:
            self._estimates[key] = self.estimator.need(choice, tokens)
        return self._estimates[key]

    def need(self, choice: Choice, tokens: int) -> int:
        """Bytes: planned if it was, else estimated, corrected by what a plan of its like has shown."""
        made = self.plans.get((choice, tokens))
        if made is not None:
            return made.reserved_bytes
        estimate = self.estimate(choice, tokens)
        assert estimate is not None
        return estimate + self.errors.get(self._kind(choice), 0)

    def _kind(self, choice: Choice) -> tuple[Any, ...]:
        tiers = tuple(dict.fromkeys(layers_by_tier(choice.activations, self.estimator.depth)))
        return tiers, choice.step_in_backward, choice.accumulation > 1

    def really(self, choice: Choice, tokens: int) -> int:
        """Bytes, planned."""
        if (choice, tokens) not in self.plans:
            made = self.make_plan(self.with_length(choice, tokens))
            self.plans[choice, tokens] = made
            estimate = self.estimate(choice, tokens)
            assert estimate is not None
            self.errors[self._kind(choice)] = made.reserved_bytes - estimate
        return self.plans[choice, tokens].reserved_bytes

    def with_length(self, choice: Choice, tokens: int) -> Any:
        return self.args.lowmem_replace(**choice.values, max_length=tokens)

    def weigh(self, tokens: int) -> None:
        """Drop what is no choice on this model: a policy that its layers refuse, a rule that would be another's."""
        if not self.found:
            raise ValueError(
                "a budget leaves nothing to choose: the arguments accept no combination of the settings that are open. "
                "Leave more of them unset."
            )
        left = [c for c in self.found if self.estimator.update(c) is not None]
        if not left:  # every rule left would be plain Adam's
            optim, rank = self.found[0].optim, getattr(self.args, "lowmem_rank", None)
            default = OPTIMIZERS[optim].DEFAULTS["rank"]
            widest = max((min(s.shape) for s in self.estimator.shapes if s.trained and len(s.shape) > 1), default=0)
            raise ValueError(
                f"optim={optim!r} with lowmem_rank={rank!r}{f' (by default {default})' if rank is None else ''}: no "
                f"weight of this model is larger than that in both directions (at most {widest}), so the rule would be "
                f"plain Adam's and save nothing. Set lowmem_rank to less than {widest}, or set optim='adamw'."
            )
        self.found = left
        refused = self.refused
        for policy in dict.fromkeys(t for c in self.found for t in layers_by_tier(c.activations, self.estimator.depth)):
            try:
                self.estimator.at(policy, 1, tokens)
            except (CannotSimulate, ValueError) as error:  # what `plan` would say of it; the answer says it, too
                refused[policy] = error
        self.found = [
            c for c in self.found if not refused.keys() & set(layers_by_tier(c.activations, self.estimator.depth))
        ]
        if not self.found and refused:
            raise next(iter(refused.values()))

    def in_order(self, tokens: int) -> tuple[list[Choice], dict[Choice, float]]:
        """The combinations in order of preference, and the cost of each."""
        estimator = self.estimator
        work = Work.of(estimator.config, estimator.shapes, tokens)
        sequences = estimator.method.rows
        policies = {t for c in self.found for t in layers_by_tier(c.activations, estimator.depth)}
        # What is no candidate costs no simulation; the order of the others does not depend on it.
        kept = {policy: estimator.kept_a_token(policy) for policy in policies}
        costs = {}
        for c in self.found:
            update = estimator.update(c)
            assert update is not None
            costs[c] = cost_a_token(c, work, update, c.batch * sequences * tokens, estimator.depth, kept)
        return sorted(self.found, key=lambda c: (c.departure, costs[c], self.estimate(c, tokens), repr(c))), costs

    def for_budget(self, label: str, budget: int) -> "Search":
        """The same question for this budget, in bytes. `label`: how an error calls it."""
        self.label, self.budget = label, budget
        return self

    def answer(self, tokens: int) -> Found:
        """The first in the order that fits. Raises NothingFits."""
        order, costs = self.in_order(tokens)
        before = len(self.plans)
        while True:
            fitting = next((c for c in order if self.need(c, tokens) <= self.budget), None)
            if fitting is None:
                smallest = min(order, key=lambda c: self.need(c, tokens))
                if self.really(smallest, tokens) <= self.budget:
                    continue
                if smallest is min(order, key=lambda c: self.need(c, tokens)):
                    raise self.nothing(smallest, tokens)
                continue
            if self.really(fitting, tokens) > self.budget:
                continue
            preferred = order[: order.index(fitting)]
            nearest = min(preferred, key=lambda c: self.need(c, tokens), default=None)
            if nearest is None or (nearest, tokens) in self.plans or len(self.plans) - before >= MOST_PLANS:
                break
            if self.really(nearest, tokens) > self.budget:
                again = min(preferred, key=lambda c: self.need(c, tokens))
                if again is nearest or self.need(again, tokens) > self.budget:
                    break
        return self._found(fitting, nearest, tokens, costs, len(self.plans) - before)

    def _found(
        self, choice: Choice, nearest: Choice | None, tokens: int, costs: dict[Choice, float], planned: int
    ) -> Found:
        following = None
        if nearest is not None:
            following = {
                "chosen": nearest.changes(self.args),
                "reserved_bytes": self.need(nearest, tokens),
                "planned": (nearest, tokens) in self.plans,
                "time": round(costs[nearest] / costs[choice], 4),
            }
        least: dict[str, int] = {}  # of each optimizer that was passed over
        for c in self.found:
            if c.optim != choice.optim and c.departure < choice.departure:
                least[c.optim] = min(least.get(c.optim, self.need(c, tokens)), self.need(c, tokens))
        chosen = choice.changes(self.args)
        if tokens != self.args.max_length:
            chosen["max_length"] = tokens
        made = self.plans[choice, tokens]
        return Found(
            budget=self.budget,
            args=self.args.lowmem_settle(**choice.values, max_length=tokens),
            chosen=chosen,
            plan=made,
            why=explain(self.budget, choice, chosen, made, following, least, len(self.found), self.args, self.refused),
            next=following,
            candidates=len(self.found),
            simulated=self.estimator.simulated,
            planned=planned,
            seconds=round(time.perf_counter() - self.began, 1),
        )

    def nothing(self, smallest: Choice, tokens: int) -> NothingFits:
        made = self.plans[smallest, tokens]
        return NothingFits(
            f"{self.label}: nothing fits in {human_bytes(self.budget)}. The smallest of {len(self.found):,} "
            f"combinations needs {human_bytes(made.reserved_bytes)}, {human_bytes(made.parts['weights'])} of it "
            f"weights: {describe(smallest.changes(self.args))}, at max_length={tokens}. Raise the budget to that, "
            "shorten max_length, leave more settings open, train a LoRA (peft_config), or shard the model over several "
            "devices (fsdp=True).",
            chosen=smallest.changes(self.args),
            plan=made,
            candidates=len(self.found),
            seconds=round(time.perf_counter() - self.began, 1),
        )

    def longest(self, limit: int) -> int:
        """The longest sequence, in multiples of STEP, for which something fits. Raises NothingFits."""
        at_ends = [sorted(self.found, key=lambda c: self.estimate(c, n) or 0)[:POOL] for n in (STEP, limit)]
        pool = list(dict.fromkeys(at_ends[0] + at_ends[1]))

        def smallest(tokens: int) -> Choice:
            return min(pool, key=lambda c: (self.need(c, tokens), c.departure, repr(c)))

        fits, too_long = 0, limit // STEP + 1
        while too_long - fits > 1:
            low, high = fits, too_long
            while high - low > 1:  # by the estimates
                middle = (low + high) // 2
                inside = self.need(smallest(middle * STEP), middle * STEP) <= self.budget
                low, high = (middle, high) if inside else (low, middle)
            guess = max(low, fits + 1)
            if self.really(smallest(guess * STEP), guess * STEP) <= self.budget:
                fits = guess
            else:
                too_long = guess
        if not fits:
            raise self.nothing(smallest(STEP), STEP)
        return fits * STEP
