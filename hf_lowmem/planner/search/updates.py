"""Memory of an optimizer's update, apart from the rest of the step: its states and its temporaries.

Neither depends on the batch or on what layers keep, so a search needs them once for each (optim, lowmem_state,
lowmem_weights, lowmem_embeddings), not for each combination with the rest. Ours update parameter by parameter: states
are counted over the whole model without allocating anything (`state_bytes`), and the temporaries are those of the worst
parameter, which a model of a few layers has as well, and one of a small vocabulary where long parameters are updated in
parts. torch's foreach AdamW has temporaries of all parameters at once, so HuggingFace's names are simulated with the
trainer at two depths, and lie on the line through them.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from hf_lowmem.activations.detect import find_stack
from hf_lowmem.optim import OPTIMIZERS, from_spec
from hf_lowmem.optim.base import LowMemOptimizer
from hf_lowmem.optim.chunked import CHUNK
from hf_lowmem.optim.row_steps import whole_only
from hf_lowmem.planner.allocations import Live
from hf_lowmem.specs import STORES_AT_REST, OptimSpec

__all__ = ["ENOUGH", "Described", "Update", "describe_update", "own_temporaries"]

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
    """What an optimizer says of a model without making anything. states: bytes; head_by_rows: see `Update`; cuts:
    whether it updates embedding and output head a part at a time, so that temporaries do not grow with the vocabulary.
    """

    states: int
    head_by_rows: bool
    cuts: bool


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
