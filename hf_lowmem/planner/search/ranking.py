"""Candidates in their order, and what is known of what they need: `Search`, which answers `search` and `longest`."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from hf_lowmem.memory import human_bytes
from hf_lowmem.optim import OPTIMIZERS
from hf_lowmem.planner.allocations import CannotSimulate
from hf_lowmem.planner.search.cost import Work, cost_a_token
from hf_lowmem.planner.search.estimate import Estimator
from hf_lowmem.planner.search.explain import Answer, NothingFits, describe, explain
from hf_lowmem.planner.search.losses import parts_of
from hf_lowmem.planner.search.space import AS_IS, Choice, layers_by_tier
from hf_lowmem.planner.simulate import Plan
from hf_lowmem.specs import STORES_AT_REST

__all__ = ["STEP", "Found", "Search"]

MOST_PLANS = 3  # of one length; the answer itself is planned in any case
BY_LINES = 10  # lengths that are planned before they are halved instead
# An estimate is at most so far from its plan, and so far once a plan of its kind has corrected it: what is further
# above the budget is not planned to make sure.
NEAR, CORRECTED = 0.03, 0.005
STEP = 64  # tokens: lengths are multiples of it
POOL = 64  # combinations that may be the smallest at some length: those that are so at the shortest or the longest


@dataclass(frozen=True)
class Found:
    """The answer of a search.

    args:    a copy of the arguments with the choice in it
    chosen:  the fields that it sets otherwise than the arguments had them
    plan:    of the choice; `plan.reserved_bytes` is within the budget
    why:     sentences
    losses:  what each part of the choice was measured to cost in loss, in per cent; None: not measured
    time:    a step's, as a part of that of the fastest combination, by the cost model
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
    losses: dict[str, float | None]
    time: float
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
    """One model and its candidates, and what is known of them. Several budgets may be asked for, one after another.

    args: of who asks; the estimator's are of who asked first, and say the same
    bf16_weights: whether trained weights are bfloat16
    """

    estimator: Estimator
    make_plan: Callable[[Any], Plan]
    found: list[Choice]
    began: float
    args: Any
    bf16_weights: bool = False
    budget: int = 0
    label: str = ""
    plans: dict[tuple[Choice, int], Plan] = field(default_factory=dict)
    errors: dict[tuple[Any, ...], int] = field(default_factory=dict)
    refused: dict[str, Exception] = field(default_factory=dict)  # activation policies, and why
    _kept: dict[str, float] = field(default_factory=dict)  # policy → bytes a token, once they are simulated
    _works: dict[int, Work] = field(default_factory=dict)
    _costs: dict[tuple[Choice, int, bool], float] = field(default_factory=dict)
    _estimates: dict[tuple[Choice, int], int] = field(default_factory=dict)

    def estimate(self, choice: Choice, tokens: int) -> int:
        key = choice, tokens
        if key not in self._estimates:
            estimate = self.estimator.need(choice, tokens)
            assert estimate is not None, "`weigh` drops what is no choice on this model"
            self._estimates[key] = estimate
        return self._estimates[key]

    def need(self, choice: Choice, tokens: int) -> int:
        """Bytes: planned if it was, else estimated, corrected by what a plan of its like has shown."""
        made = self.plans.get((choice, tokens))
        if made is not None:
            return made.reserved_bytes
        return self.estimate(choice, tokens) + self.errors.get(self._kind(choice), 0)

    def _kind(self, choice: Choice) -> tuple[Any, ...]:
        rests = choice.weights in STORES_AT_REST
        return tuple(dict.fromkeys(self._tiers(choice))), choice.step_in_backward, choice.accumulation > 1, rests

    def _tiers(self, choice: Choice) -> tuple[str, ...]:
        return layers_by_tier(choice.activations, self.estimator.depth)

    def really(self, choice: Choice, tokens: int) -> int:
        """Bytes, planned."""
        if (choice, tokens) not in self.plans:
            self.plans[choice, tokens] = self.make_plan(self.with_length(choice, tokens))
        made = self.plans[choice, tokens].reserved_bytes
        self.errors[self._kind(choice)] = made - self.estimate(choice, tokens)
        return made

    def with_length(self, choice: Choice, tokens: int) -> Any:
        return self.estimator.args.lowmem_replace(**choice.values, max_length=tokens)

    def weigh(self) -> None:
        """Drop what is no choice on this model: a rule that would be another's, a store that none of its weights has.

        Raises:
            ValueError: where nothing is left.
        """
        if not self.found:
            raise ValueError(
                "a budget leaves nothing to choose: the arguments accept no combination of the settings that are open. "
                "Leave more of them unset."
            )
        left = [c for c in self.found if self.estimator.updates.states(c) is not None]
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

    def simulate_policies(self, tokens: int) -> None:
        """Simulate what layers keep under each policy, and drop those that this model refuses; `refused` says why.

        Raises:
            CannotSimulate, ValueError: where none is left, what `plan` would say of the first.
        """
        for policy in dict.fromkeys(tier for c in self.found for tier in self._tiers(c)):
            try:
                self.estimator.at(policy, 1, tokens)
                self._kept[policy] = self.estimator.kept_a_token(policy)
            except (CannotSimulate, ValueError) as error:
                self.refused[policy] = error
        self.found = [c for c in self.found if not self.refused.keys() & set(self._tiers(c))]
        if not self.found and self.refused:
            raise next(iter(self.refused.values()))

    def cost(self, choice: Choice, tokens: int) -> float:
        """Time of a token. Before policies are simulated, only choices under one of them can be compared."""
        key = choice, tokens, bool(self._kept)
        if key not in self._costs:
            if tokens not in self._works:
                estimator = self.estimator
                matmul = estimator.args.lowmem_matmul_spec()
                self._works[tokens] = Work.of(estimator.config, estimator.shapes, tokens, matmul)
            states, rows = self.estimator.updates.states(choice), choice.batch * self.estimator.method.rows * tokens
            assert states is not None
            kept = self._kept or dict.fromkeys(self._tiers(choice), 0.0)
            self._costs[key] = cost_a_token(choice, self._works[tokens], states, rows, self.estimator.depth, kept)
        return self._costs[key]

    def in_order(self, tokens: int) -> list[Choice]:
        """All combinations in order of preference."""
        if not self._kept:
            self.simulate_policies(tokens)
        return self._sorted(self.found, tokens)

    def _sorted(self, choices: Iterable[Choice], tokens: int) -> list[Choice]:
        return sorted(choices, key=lambda c: (c.departure, self.cost(c, tokens), self.estimate(c, tokens), repr(c)))

    def first(self, tokens: int) -> Choice | None:
        """The most preferred combination, where that is known without estimates: nothing is faster than layers that
        keep all, in the largest micro-batch. None: the order has to be computed."""
        nearest = min(c.departure for c in self.found)
        group = [c for c in self.found if c.departure == nearest]
        policies = {c.activations for c in group}
        policy = AS_IS if AS_IS in policies else next(iter(policies)) if len(policies) == 1 else None
        group = [c for c in group if c.activations == policy and ":" not in c.activations]
        return min(group, key=lambda c: (self.cost(c, tokens), repr(c)), default=None)

    def for_budget(self, label: str, budget: int) -> "Search":
        """The same question for this budget, in bytes. `label`: how an error calls it."""
        self.label, self.budget = label, budget
        return self

    def answer(self, tokens: int) -> Found:
        """The first in the order that fits. Raises NothingFits.

        What is preferred to all is tried before anything is estimated, and level after level of departure: one whose
        weights, states and gradients alone are too large costs no simulation.
        """
        before = len(self.plans)
        first = self.first(tokens)
        if first is not None and self.estimator.least(first) <= self.budget:
            if (first, tokens) not in self.plans:
                self.plans[first, tokens] = self.make_plan(self.with_length(first, tokens))
            if self.plans[first, tokens].reserved_bytes <= self.budget:
                return self._found(first, None, tokens, len(self.plans) - before)
        if not self._kept:
            self.simulate_policies(tokens)
        passed: list[Choice] = []
        for level in sorted({c.departure for c in self.found}):
            group = [c for c in self.found if c.departure == level and self.estimator.least(c) <= self.budget]
            order = self._sorted(group, tokens)
            fitting, nearest = self._choose(order, tokens, before)
            if fitting is not None:
                nearest = nearest or min(passed, key=lambda c: self.need(c, tokens), default=None)
                return self._found(fitting, nearest, tokens, len(self.plans) - before)
            passed += order
        while True:
            smallest = self._smallest(tokens)
            if self.really(smallest, tokens) <= self.budget:
                return self._found(smallest, None, tokens, len(self.plans) - before)
            if smallest is self._smallest(tokens):
                raise self.nothing(smallest, tokens)

    def _choose(self, order: list[Choice], tokens: int, before: int) -> tuple[Choice | None, Choice | None]:
        """The first of an order that fits, and of what was preferred to it that which comes nearest to fitting.

        An estimate that is near the budget is not believed: what is behind it may fit and be preferred.
        """
        while True:
            fitting = next((c for c in order if self.need(c, tokens) <= self.budget), None)
            if fitting is None:
                smallest = min(order, key=lambda c: self.need(c, tokens), default=None)
                if smallest is None or not self._is_near(smallest, tokens, before):
                    return None, None
                self.really(smallest, tokens)
                continue
            if self.really(fitting, tokens) > self.budget:
                continue
            preferred = order[: order.index(fitting)]
            nearest = min(preferred, key=lambda c: self.need(c, tokens), default=None)
            if nearest is None or not self._is_near(nearest, tokens, before):
                return fitting, nearest
            if self.really(nearest, tokens) > self.budget:
                again = min(preferred, key=lambda c: self.need(c, tokens))
                if again is nearest or self.need(again, tokens) > self.budget:
                    return fitting, nearest

    def _is_near(self, choice: Choice, tokens: int, before: int) -> bool:
        """Whether a plan may show that a choice fits, though its estimate does not; there are not many plans."""
        if (choice, tokens) in self.plans or len(self.plans) - before >= MOST_PLANS:
            return False
        margin = CORRECTED if self._kind(choice) in self.errors else NEAR
        return self.need(choice, tokens) <= (1 + margin) * self.budget

    def _smallest(self, tokens: int) -> Choice:
        """Combination that needs least. They are looked at by what they need in any case, until that is more."""
        best: Choice | None = None
        for c in sorted(self.found, key=lambda c: (self.estimator.least(c), c.departure, repr(c))):
            if best is not None and self.estimator.least(c) >= self.need(best, tokens):
                break
            if best is None or self.need(c, tokens) < self.need(best, tokens):
                best = c
        assert best is not None
        return best

    def _known(self, choice: Choice, tokens: int) -> int:
        """Bytes that a combination needs at least, as far as it was looked at."""
        if (choice, tokens) in self.plans or (choice, tokens) in self._estimates:
            return self.need(choice, tokens)
        return self.estimator.least(choice)

    def _found(self, choice: Choice, nearest: Choice | None, tokens: int, planned: int) -> Found:
        following = None
        if nearest is not None:
            following = {
                "chosen": nearest.changes(self.args),
                "reserved_bytes": self.need(nearest, tokens),
                "planned": (nearest, tokens) in self.plans,
                "time": round(self.cost(nearest, tokens) / self.cost(choice, tokens), 4),
            }
        least: dict[str, int] = {}  # of each optimizer that was passed over
        for c in self.found:
            if c.optim != choice.optim and c.departure < choice.departure:
                least[c.optim] = min(least.get(c.optim, self._known(c, tokens)), self._known(c, tokens))
        chosen = choice.changes(self.args)
        if tokens != self.args.max_length:
            chosen["max_length"] = tokens
        made = self.plans[choice, tokens]
        costs = parts_of(choice, self._tiers(choice), bf16_weights=self.bf16_weights)
        return Found(
            budget=self.budget,
            args=self.args.lowmem_settle(**choice.values, max_length=tokens),
            chosen=chosen,
            plan=made,
            why=explain(
                Answer(
                    budget=self.budget,
                    choice=choice,
                    chosen=chosen,
                    plan=made,
                    following=following,
                    least=least,
                    count=len(self.found),
                    args=self.args,
                    refused=self.refused,
                    losses=costs,
                    first=following is None and choice == self.first(tokens),
                )
            ),
            next=following,
            losses=costs,
            time=self._slower(choice, tokens),
            candidates=len(self.found),
            simulated=self.estimator.simulated,
            planned=planned,
            seconds=round(time.perf_counter() - self.began, 1),
        )

    def _slower(self, choice: Choice, tokens: int) -> float:
        """Time of a step as a part of that of the fastest combination, which keeps all and departs least."""
        first = self.first(tokens)
        return 1.0 if first is None else round(self.cost(choice, tokens) / self.cost(first, tokens), 3)

    def nothing(self, smallest: Choice, tokens: int) -> NothingFits:
        """The refusal, which names the least."""
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
        self.simulate_policies(STEP)
        possible = [c for c in self.found if self.estimator.least(c) <= self.budget] or self.found
        at_ends = [sorted(possible, key=lambda c: self.estimate(c, n))[:POOL] for n in (STEP, limit)]
        pool = list(dict.fromkeys(at_ends[0] + at_ends[1]))

        def smallest(tokens: int) -> Choice:
            return min(pool, key=lambda c: (self.need(c, tokens), c.departure, repr(c)))

        fits, too_long = 0, limit // STEP + 1
        seen: list[tuple[int, int]] = []
        while too_long - fits > 1:
            guess = (fits + too_long) // 2
            if 1 < len(seen) < BY_LINES:
                guess = _on_the_line(seen[-2], seen[-1], self.budget, guess)
            elif len(seen) < BY_LINES:
                low, high = fits, too_long
                while high - low > 1:  # by the estimates
                    middle = (low + high) // 2
                    inside = self.need(smallest(middle * STEP), middle * STEP) <= self.budget
                    low, high = (middle, high) if inside else (low, middle)
                guess = low
            guess = min(max(guess, fits + 1), too_long - 1)
            seen.append((guess, self.really(smallest(guess * STEP), guess * STEP)))
            fits, too_long = (guess, too_long) if seen[-1][1] <= self.budget else (fits, guess)
        if not fits:
            raise self.nothing(smallest(STEP), STEP)
        return fits * STEP


def _on_the_line(one: tuple[int, int], other: tuple[int, int], budget: int, otherwise: int) -> int:
    """The last length within a budget on the line through two lengths and what they really need. Estimates are made
    of short sequences, of which a streamed layer is one chunk; they rise by too much for a token of a long one."""
    slope = (other[1] - one[1]) / (other[0] - one[0])
    return int(other[0] + (budget - other[1]) // slope) if slope > 0 else otherwise
