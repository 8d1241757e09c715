"""Many combinations from few simulations: an estimate of what any of them needs.

A plan takes seconds, and there are thousands of combinations. But the parts of a step hardly meet: what layers keep
does not depend on the optimizer, and an update not on the batch. So the passes (forward and backward) are simulated
once for each activation policy, with an optimizer that keeps nothing, at two depths, and at the shallower one with a
second micro-batch; each moment at the ends of the model is a line in both (a layer's activations grow with the tokens,
its weights and gradients do not), so any depth and any micro-batch follows. Updates are weighed apart
(`updates`). The peak of a combination is then the highest of

    at each moment of the passes    weights + states + gradients so far + what that moment keeps
    at the update                   weights + states + gradients + the update's temporaries
    at an update in backward        weights + states + what is kept + the largest gradient + the update's temporaries

(of an output head that is stepped by rows, the simulated pass without its gradient: hf_lowmem/training/head.py).

What it leaves out (that a gradient and a temporary may not meet, layers of several kinds) makes it an estimate. It
orders candidates, and no more: what a search answers has been planned by the real `plan()`.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from hf_lowmem.activations.detect import find_stack
from hf_lowmem.optim import accumulator
from hf_lowmem.planner.methods import Method
from hf_lowmem.planner.models import Shape, layer_count, meta_model, period_of, shapes_of, sharing_of, with_depth
from hf_lowmem.planner.moments import KEPT, ROUNDING, Moment, outline
from hf_lowmem.planner.parallel import spread
from hf_lowmem.planner.parts import PARTS, curve_of
from hf_lowmem.planner.quiet import quiet
from hf_lowmem.planner.search.space import AS_IS, CHECKPOINTING, Choice, layers_by_tier, policy_fields
from hf_lowmem.planner.search.updates import Update, Updates
from hf_lowmem.planner.simulate import CUDA_CONTEXT
from hf_lowmem.planner.step import simulate_step
from hf_lowmem.specs import OPTIMIZER_FIELDS, STORES_AT_REST

__all__ = ["Estimator"]

WEIGHTS, STATES, GRADIENTS, INPUTS, TEMPORARIES, ACTIVATIONS = (
    PARTS.index(name) for name in ("weights", "states", "gradients", "inputs", "temporaries", "activations")
)
NO_STATES = "sgd"  # of HuggingFace: an optimizer that keeps nothing


class End(NamedTuple):
    """A moment at the ends of the model. where: "before" or "after" the layers, or at the "first" or "last" of them."""

    phase: str
    where: str


# In the order of a step. Forward goes from the first layer to the last and backward back again. What a layer keeps is
# given back when its own backward ends: all is kept from KEPT_ALL until LAST_BACKWARD, nothing after FIRST_BACKWARD.
KEPT_ALL = End(KEPT, "after")
LAST_BACKWARD, FIRST_BACKWARD = End("backward", "last"), End("backward", "first")
ENDS = (
    End("forward", "before"),
    End("forward", "first"),
    End("forward", "last"),
    End("forward", "after"),
    KEPT_ALL,
    End("backward", "before"),
    LAST_BACKWARD,
    FIRST_BACKWARD,
    End("backward", "after"),
)
BETWEEN = End("backward", "between")  # of a mixture: backward goes on to the layers with the first layer's policy
AT = {end: i for i, end in enumerate(ENDS)}
Values = NDArray[np.float64]  # (len(ENDS), len(PARTS) + 1) bytes


@dataclass(frozen=True)
class _Gradients:
    """Bytes of trained parameters' gradients: of all, of the largest, of the largest in a layer, of all as sums in
    int8."""

    whole: int
    largest: int
    in_layer: int
    summed: int


@dataclass
class Estimator:
    """Estimates for one model and one set of arguments. `simulated` counts the simulations so far.

    points: two micro-batches (sequences, tokens a sequence) to draw lines through; three where what is kept grows with
        the square of the tokens
    """

    config: PreTrainedConfig
    args: Any
    method: Method
    dtype: torch.dtype
    points: Sequence[tuple[int, int]]
    attention: str | None = None
    accelerator: bool = True
    peft_config: Any = None
    quantization: Any = None
    world_size: int = 1
    parallel: str | None = None
    progress: Callable[[str], None] = lambda message: None
    simulated: int = 0
    _ends: dict[tuple[str, int, int], Values] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.depth = layer_count(self.config)
        period = math.lcm(period_of(self.config), *sharing_of(self.args.lowmem_activations))
        self.depths = (2 * period, 3 * period) if 3 * period < self.depth else (self.depth,)
        with quiet():
            self.meta = meta_model(
                *(self.config, self.dtype, self.peft_config, self.quantization),
                matmul=None if self.parallel == "fsdp2" else self.args.lowmem_matmul_spec(),
            )
        self.tied = bool(getattr(self.config.get_text_config(), "tie_word_embeddings", False))
        self.updates = Updates(
            self.config,
            self.args,
            self.dtype,
            self.meta,
            self._simulate,
            self.depths,
            tied=self.tied,
            attention=self.attention,
            accelerator=self.accelerator,
            peft_config=self.peft_config,
            quantization=self.quantization,
        )
        nothing = dict.fromkeys(
            (
                *(f"lowmem_{name}" for name in (*OPTIMIZER_FIELDS, "accumulation")),
                "optim_args",
                "optim_target_modules",
            )
        )
        self.bare = self.args.lowmem_replace(optim=NO_STATES, lowmem_step_in_backward=False, **nothing)

    @cached_property
    def shapes(self) -> list[Shape]:
        """The parameters of the whole model."""
        return shapes_of(self.meta, find_stack(self.meta)[0])

    def ends(self, policy: str, point: int, depth: int) -> Values:
        """The moments of ENDS in a simulated step without states, of all layers under one policy."""
        key = policy, point, depth
        if key not in self._ends:
            batch, tokens = self.points[point]
            args = self.bare.lowmem_replace(
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=1,
                max_length=tokens,
                **policy_fields(policy),
            )
            self._ends[key] = _ends_of(self._simulate(args, depth), depth)
        return self._ends[key]

    def _simulate(self, args: Any, depth: int, steps: int = 1) -> list[Moment]:
        sequences, tokens = self.method.shape(args)
        policy = args.lowmem_activations or (CHECKPOINTING if args.gradient_checkpointing else AS_IS)
        self.progress(f"estimating with {depth} of {self.depth} layers, {sequences} × {tokens} tokens, {policy}")
        self.simulated += 1
        measured = simulate_step(
            with_depth(self.config, depth),
            args,
            self.method,
            dtype=self.dtype,
            attention=self.attention,
            accelerator=self.accelerator,
            peft_config=copy.deepcopy(self.peft_config),
            **({} if self.quantization is None else {"quantization": self.quantization}),
            steps=steps,
        )
        return outline(curve_of(measured), measured.live, measured.start, measured.stack)

    def at(self, policy: str, batch: int, tokens: int) -> Values:
        """The moments of ENDS in the whole model for any micro-batch: on the line through the two that were simulated,
        or on the parabola through three."""
        n, here = [rows * length for rows, length in self.points], batch * tokens
        weights = [np.prod([(here - other) / (own - other) for other in n if other != own]) for own in n]
        return np.sum([weight * self._deep(policy, point) for point, weight in enumerate(weights)], axis=0)

    def _deep(self, policy: str, point: int) -> Values:
        shallow = self.ends(policy, point, self.depths[0])
        if len(self.depths) == 1:
            return shallow
        if len(self.points) > 2:
            rise = self.ends(policy, point, self.depths[1]) - shallow
        else:
            rise = self.ends(policy, 0, self.depths[1]) - self.ends(policy, 0, self.depths[0])
            rows, others = self.points[point], self.points[0]
            rise[:, ACTIVATIONS] *= rows[0] * rows[1] / (others[0] * others[1])
        return shallow + rise * (self.depth - self.depths[0]) / (self.depths[1] - self.depths[0])

    def kept_a_token(self, policy: str) -> float:
        """Bytes that are kept for backward for one more token."""
        n = [rows * length for rows, length in self.points]
        low, high = (self._deep(policy, point)[AT[KEPT_ALL], ACTIVATIONS] for point in (0, 1))
        return max(0.0, (high - low) / (n[1] - n[0]))

    def need(self, choice: Choice, tokens: int) -> int | None:
        """Bytes of one device that a combination takes, as `Plan.reserved_bytes`. None: not a choice on this model."""
        if self.updates.states(choice) is None:
            return None
        moments = self._moments(choice, tokens, self.updates.of(choice))
        if self.parallel is not None:
            moments = spread(
                moments,
                self.shapes,
                world=self.world_size,
                parallel=self.parallel,
                mixed=self.args.bf16 or self.args.fp16,
                accumulates=choice.accumulation > 1,
            )
        highest = max(m.total + int(m.values[ROUNDING]) for m in moments)
        return highest + (CUDA_CONTEXT if self.accelerator else 0)

    def least(self, choice: Choice) -> int:
        """Bytes below which no activations and no update bring a combination: weights, states, and gradients where they
        wait for the update. Of several processes nothing is said: 0."""
        states = self.updates.states(choice)
        if self.parallel is not None or states is None:
            return 0
        weights = sum(s.nbytes for s in self.shapes)
        weights -= self.updates.rested.saved if choice.weights in STORES_AT_REST else 0
        gradients = 0 if choice.step_in_backward else self.gradients.whole
        return weights + states + gradients + (CUDA_CONTEXT if self.accelerator else 0)

    @cached_property
    def gradients(self) -> _Gradients:
        trained = [s for s in self.shapes if s.trained]
        return _Gradients(
            whole=sum(s.nbytes for s in trained),
            largest=max((s.nbytes for s in trained), default=0),
            in_layer=max((s.nbytes for s in trained if s.layer is not None), default=0),
            summed=sum(accumulator.nbytes(s.numel) or s.nbytes for s in trained),
        )

    def _gradients_at(self, end: End, choice: Choice, simulated: float) -> float:
        """Bytes of gradients at one moment.

        The simulated step makes all of them in one backward pass and keeps them. Stepping in backward keeps those that
        are on their way: before the layers what was simulated, at a layer its largest, after them the embedding's. A
        tied head's waits for the embedding's until that is there. With several micro-batches there are those of all
        parameters from the passes before, and in backward what is on its way beside.
        """
        sizes, (phase, where) = self.gradients, end
        summed = self._summed(choice)
        passing = {"before": simulated, "after": sizes.largest}.get(where, sizes.in_layer)
        if choice.step_in_backward and phase == "backward" and where != "before":
            return summed + passing + (sizes.largest if self.tied and where != "after" else 0)
        if choice.accumulation > 1:
            return (summed or sizes.whole) + (passing if phase == "backward" else 0)
        return simulated

    def _summed(self, choice: Choice) -> int:
        """Bytes of the gradients that step in backward has added up in int8 in the passes before."""
        return self.gradients.summed if choice.accumulation > 1 and self.args.lowmem_accumulation is not None else 0

    def _by_rows(self, choice: Choice, update: Update) -> bool:
        """Whether the output head's gradient does not exist whole."""
        alone = choice.accumulation == 1 and self.parallel != "fsdp2"
        return choice.step_in_backward and alone and update.head_by_rows

    def _moments(self, choice: Choice, tokens: int, update: Update) -> list[Moment]:
        """The moments of the passes, each with what a combination has beside the simulated step, and the update's."""
        made: list[Moment] = []
        for i, (end, simulated) in enumerate(self._mixed(choice, tokens)):
            values = simulated.copy()
            values[STATES] = update.states
            if choice.weights in STORES_AT_REST:
                values[WEIGHTS] -= self.updates.rested.saved
                values[TEMPORARIES] += self.updates.rested.decoded if end.where in ("first", "last") else 0
            values[INPUTS] *= choice.accumulation
            of_head = 0.0 if self._by_rows(choice, update) else simulated[GRADIENTS]
            values[GRADIENTS] = self._gradients_at(end, choice, of_head)
            layer = {"first": 0, "last": self.depth - 1}.get(end.where)
            made.append(Moment(i, end.phase, layer, "", end.where == "before", np.rint(values).astype(np.int64)))
        if choice.step_in_backward:  # of the head, when all is still kept; of the embedding, when nothing is
            late = self.tied or self._by_rows(choice, update)
            kept = next(m for m in made if m.phase == KEPT)
            largest, in_layer, summed = self.gradients.largest, self.gradients.in_layer, self._summed(choice)
            for at, gradient, more in (
                (made[-1] if late else kept, largest + (0 if late else summed), update.outside),
                (kept, in_layer + summed, update.temporaries),
            ):
                values = at.values.copy()
                values[GRADIENTS], values[TEMPORARIES] = gradient, values[TEMPORARIES] + more
                made.append(Moment(len(made), "backward", None, "", False, values))
        else:
            values = made[0].values.copy()
            values[ACTIVATIONS], values[GRADIENTS] = 0, self.gradients.whole
            values[TEMPORARIES] = max(update.temporaries, update.outside)
            made.append(Moment(len(made), "optimizer", None, "", False, values))
        return made

    def _mixed(self, choice: Choice, tokens: int) -> list[tuple[End, Values]]:
        """The moments of ENDS. Of a mixture, each policy counts by its share of the layers, but what a layer does while
        it runs is its own policy's; and there is one more moment, BETWEEN."""
        tiers = layers_by_tier(choice.activations, self.depth)
        each = {tier: self.at(tier, choice.batch, tokens) for tier in dict.fromkeys(tiers)}
        if len(each) == 1:
            return list(zip(ENDS, next(iter(each.values())), strict=True))
        shares = {tier: tiers.count(tier) / self.depth for tier in each}
        blend = np.sum([share * each[tier] for tier, share in shares.items()], axis=0)
        running = {"first": each[tiers[0]], "last": each[tiers[-1]]}
        made = []
        for i, end in enumerate(ENDS):
            values = np.array(blend[i])
            own = running.get(end.where)
            if own is not None:
                values[TEMPORARIES] = own[i, TEMPORARIES]
            if end == LAST_BACKWARD:  # all is kept, and the last layer computes again what its policy has not kept
                last = running["last"]
                values[ACTIVATIONS] += last[i, ACTIVATIONS] - last[AT[KEPT_ALL], ACTIVATIONS]
                values[ACTIVATIONS] -= blend[i, ACTIVATIONS] - blend[AT[KEPT_ALL], ACTIVATIONS]
            made.append((end, values))
            if end == LAST_BACKWARD:  # the layers with the first one's policy have all of theirs, the others nothing
                low, share = running["first"], shares[tiers[0]]
                done = low[AT[FIRST_BACKWARD]]
                made.append((BETWEEN, done + share * (low[i] - done)))
        return made


def _ends_of(moments: list[Moment], depth: int) -> Values:
    """The moments of ENDS in the last step of a simulation."""
    values = np.zeros((len(ENDS), ROUNDING + 1))
    last = {phase: max(m.mark for m in moments if m.phase == phase) for phase, _ in ENDS}
    for moment in moments:
        if moment.phase not in last or moment.mark != last[moment.phase]:
            continue
        places = ["before" if moment.before else "after"] if moment.layer is None else []
        places = ["after"] if moment.phase == KEPT else places
        places += ["first"] if moment.layer == 0 else []
        places += ["last"] if moment.layer == depth - 1 else []
        for place in places:
            i = AT[End(moment.phase, place)]
            if moment.values[:ROUNDING].sum() > values[i, :ROUNDING].sum():
                values[i] = moment.values
    return values
