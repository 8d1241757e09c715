"""Memory of an optimizer's update, apart from the rest of the step: its states and its temporaries.

Neither depends on the batch or on what layers keep, so a search needs them once for each (optim, lowmem_state,
lowmem_weights, lowmem_embeddings), not for each combination with the rest. Ours update parameter by parameter: states
are counted over the whole model without allocating anything (`state_bytes`), and the temporaries are those of the worst
parameter, which a model of a few layers has as well, and one of a small vocabulary where long parameters are updated in
parts. torch's foreach AdamW has temporaries of all parameters at once, so HuggingFace's names are simulated with the
trainer at two depths, and lie on the line through them.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel

from hf_lowmem.activations.detect import find_stack
from hf_lowmem.optim import OPTIMIZERS, from_spec
from hf_lowmem.optim.base import LowMemOptimizer
from hf_lowmem.optim.chunked import CHUNK
from hf_lowmem.optim.resting import rest
from hf_lowmem.optim.roles import facts_of
from hf_lowmem.optim.row_steps import whole_only
from hf_lowmem.planner.accelerator import as_on_accelerator, as_on_cpu, as_with_real_tensors
from hf_lowmem.planner.allocations import Live
from hf_lowmem.planner.models import layer_count, make_model, meta_model, period_of, with_depth
from hf_lowmem.planner.moments import Moment
from hf_lowmem.planner.parts import PARTS
from hf_lowmem.planner.quiet import quiet
from hf_lowmem.planner.search.rested import Rested, rested
from hf_lowmem.planner.search.space import AS_IS, Choice, policy_fields
from hf_lowmem.planner.step import STEPS
from hf_lowmem.specs import STORES_AT_REST, OptimSpec

__all__ = ["Update", "Updates"]

STATES, TEMPORARIES = PARTS.index("states"), PARTS.index("temporaries")
SHORT = 64  # tokens of a step of which only the update counts

ENOUGH = 3 * CHUNK  # values of an embedding that is updated in parts: as many parts as differ from each other


@dataclass(frozen=True)
class Update:
    """Bytes. states: held by the optimizer; temporaries: of the update of a weight in a layer, at their highest;
    outside: of one outside of the layers. head_by_rows: whether it takes the gradient of an output head of its own a
    block of rows at a time."""

    states: int
    temporaries: int
    outside: int = 0
    head_by_rows: bool = False


@dataclass(frozen=True)
class Described:
    """Facts that an optimizer knows of a model without making anything. states: bytes; head_by_rows: see `Update`;
    cuts: whether it updates embedding and output head a part at a time, with temporaries that do not grow with the
    vocabulary."""

    states: int
    head_by_rows: bool
    cuts: bool


@dataclass
class Updates:
    """Updates of one model, each weighed once.

    Args:
        config, args, dtype, attention, accelerator, peft_config, quantization: see `Estimator`.
        meta: the whole model on the meta device.
        simulate: runs the trainer on so many layers; for optimizers that are not ours.
        depths: numbers of layers to draw lines through.
        tied: whether embedding and output head are one weight.
    """

    config: PreTrainedConfig
    args: Any
    dtype: torch.dtype
    meta: PreTrainedModel
    simulate: Callable[[Any, int, int], list[Moment]]
    depths: tuple[int, ...]
    _: KW_ONLY
    tied: bool
    attention: str | None
    accelerator: bool
    peft_config: Any
    quantization: Any
    _updates: dict[tuple[Any, ...], Update] = field(default_factory=dict)
    _described: dict[tuple[Any, ...], Described | None] = field(default_factory=dict)
    _shallow: dict[tuple[bool, bool], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.depth = layer_count(self.config)

    def states(self, choice: Choice) -> int | None:
        """Bytes of a choice's states; None where its rule would be plain Adam's on this model, or where a rule of
        embedding and output head that nobody asked for has neither to act on."""
        if choice.embeddings not in (None, self.args.lowmem_embeddings) and not self._trains_ends:
            return None
        if choice.optim not in OPTIMIZERS:
            return self.of(choice).states
        found = self._describe(choice)
        return None if found is None else found.states

    def of(self, choice: Choice) -> Update:
        """Memory of a choice's update, whose `states` are not None."""
        key = _rule_of(choice)
        if key not in self._updates:
            ours = choice.optim in OPTIMIZERS
            self._updates[key] = self._own_update(choice) if ours else self._hf_update(choice)
        return self._updates[key]

    @cached_property
    def _trains_ends(self) -> bool:
        """Whether an embedding or an output head is trained; with adapters, mostly neither is."""
        trained = {id(p) for p in self.meta.parameters() if p.requires_grad}
        facts = facts_of(self.meta)
        return any(facts[ident]["role"] in ("embedding", "head") for ident in trained & facts.keys())

    def _spec(self, choice: Choice) -> OptimSpec:
        rests = choice.weights in STORES_AT_REST
        return self.args.lowmem_replace(
            optim=choice.optim,
            lowmem_state=choice.state,
            lowmem_weights=choice.weights,
            lowmem_embeddings=choice.embeddings,
            lowmem_step_in_backward=rests,
            max_grad_norm=0.0 if rests else self.args.max_grad_norm,
            gradient_accumulation_steps=1,
            lowmem_accumulation=None,
        ).lowmem_optim_spec()

    def _describe(self, choice: Choice) -> Described | None:
        key = _rule_of(choice)
        if key not in self._described:
            asleep = choice.weights in STORES_AT_REST
            with _as_simulated(self.accelerator):
                model = self.rested.model if asleep else self.meta
                self._described[key] = describe_update(self._spec(choice), model)
        return self._described[key]

    @cached_property
    def rested(self) -> Rested:
        """The model with its weights at rest in int8. Raises ValueError where none can be."""
        with quiet():
            return rested(OptimSpec(name="adamw", weights=STORES_AT_REST[0]), meta_model(self.config, self.dtype, None))

    def can_rest(self) -> bool:
        """Whether weights of this model can be at rest, if one process trains all of it."""
        if self.peft_config is not None or self.quantization is not None:
            return False
        if getattr(self.args, "sync_ref_model", False):
            return False
        try:
            return self.rested.saved > 0
        except ValueError:
            return False

    def _own_update(self, choice: Choice) -> Update:
        described, spec = self._describe(choice), self._spec(choice)
        assert described is not None
        kind = described.cuts, choice.weights in STORES_AT_REST
        with _as_simulated(self.accelerator):
            if kind not in self._shallow:
                self._shallow[kind] = self._shallow_model(small=kind[0])
                if kind[1]:
                    with self.fake:
                        rest(spec, self._shallow[kind])
            by_rows = not self.tied and described.head_by_rows
            layered, outside = (own_temporaries(spec, self._shallow[kind], self.fake, layers=x) for x in (True, False))
            return Update(described.states, layered, outside, by_rows)

    def _shallow_model(self, *, small: bool) -> nn.Module:
        """A fake model of a few layers. `small`: and of no larger a vocabulary than shows what an update takes."""
        config = with_depth(self.config, min(self.depth, period_of(self.config)))
        text: Any = config.get_text_config()
        if small and self.peft_config is None:
            text.vocab_size = min(text.vocab_size, max(1, ENOUGH // text.hidden_size))
            config.pad_token_id = None  # which may lie beyond
        with self.fake:
            model = make_model(config, self.dtype, self.attention, *[q for q in [self.quantization] if q is not None])
            if self.peft_config is not None:
                from peft import get_peft_model

                model = get_peft_model(model, copy.deepcopy(self.peft_config))
        return model

    def _hf_update(self, choice: Choice) -> Update:
        """The update of an optimizer that is not ours, simulated with the trainer at two depths."""
        args = self.args.lowmem_replace(
            per_device_train_batch_size=1,
            gradient_accumulation_steps=1,
            max_length=min(SHORT, self.args.max_length),
            **policy_fields(AS_IS),
        )
        found = []
        for depth in self.depths:
            moments = self.simulate(args, depth, STEPS)
            top = max((m for m in moments if m.phase == "optimizer"), key=lambda m: m.total).values
            found.append(np.array([top[STATES], top[TEMPORARIES]], dtype=np.float64))
        values = found[0]
        if len(self.depths) > 1:
            values = values + (found[-1] - found[0]) * (self.depth - self.depths[0]) / (self.depths[1] - self.depths[0])
        return Update(round(values[0]), round(values[1]))


def _rule_of(choice: Choice) -> tuple[str | None, ...]:
    """All of a choice on which its update depends."""
    return choice.optim, choice.state, choice.weights, choice.embeddings


@contextlib.contextmanager
def _as_simulated(accelerator: bool) -> Iterator[None]:
    """Context that `simulate_step` sets up, for an optimizer without a trainer."""
    device = as_on_accelerator() if accelerator else as_on_cpu()
    with quiet(), as_with_real_tensors(), device:
        yield


def describe_update(spec: OptimSpec, meta: PreTrainedModel) -> Described | None:
    """Our optimizer on a model on the meta device; None where a low-rank rule finds no matrix to work on, so that it
    would save nothing."""
    optimizer = from_spec(spec, meta)
    groups = optimizer.param_groups
    if "rank" in OPTIMIZERS[spec.name].DEFAULTS and all(group["rank"] is None for group in groups):
        return None
    outside = [getattr(m, "weight", None) for m in (meta.get_output_embeddings(), meta.get_input_embeddings())]
    pairs = [(p, group) for group in groups for p in group["params"]]
    slots = {id(p): optimizer.slot(p, group) for p, group in pairs if any(p is other for other in outside)}
    head = outside[0]
    return Described(
        states=sum(optimizer.state_bytes(p, group) for p, group in pairs),
        head_by_rows=head is not None and id(head) in slots and whole_only(head, slots[id(head)]) is None,
        cuts=all(slot.elementwise or slot.reach != "whole" for slot in slots.values()),
    )


def own_temporaries(spec: Any, model: nn.Module, fake: FakeTensorMode, *, layers: bool) -> int:
    """Bytes that a step of our optimizer holds beside weights, gradients and states, at most, on a fake model: of the
    weights in its layers, or of the others.

    It is called where accelerators' implementations are chosen, or not, for the whole search. The second step counts,
    which finds its states there. A projection is refreshed in it.
    """
    if "update_gap" in OPTIMIZERS[spec.name].DEFAULTS:
        spec = replace(spec, update_gap=1)
    live = Live(invent_numbers=True)
    stack = f"{find_stack(model)[0]}."
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    parameters = [p for name, p in named if name.startswith(stack) == layers]
    with fake, live:
        for p in parameters:
            p.grad = torch.empty_like(p)
            p.detach()  # which shows the weight to the log
        optimizer = from_spec(spec, model)
        step = partial(_one_by_one, optimizer) if spec.weights in STORES_AT_REST else optimizer.step
        step()
        start = live.clock
        step()
        end = live.clock
    for p in parameters:
        p.grad = None
    return _highest(live, start, end) - _alive(live, end)


def _one_by_one(optimizer: LowMemOptimizer) -> None:
    """A step as backward makes it, which is the only one that weights at rest have."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                optimizer.step_param(p, group)


def _alive(live: Live, clock: int) -> int:
    rows = zip(live.births, live.deaths, live.sizes, strict=True)
    return sum(size for born, died, size in rows if born <= clock and (died < 0 or died > clock))


def _highest(live: Live, start: int, end: int) -> int:
    changes = [0] * (end + 1)
    for born, died, size in zip(live.births, live.deaths, live.sizes, strict=True):
        if born <= end:
            changes[born] += size
        if 0 <= died <= end:
            changes[died] -= size
    now = highest = 0
    for clock, change in enumerate(changes):
        now += change
        highest = max(highest, now) if clock >= start else now
    return highest
