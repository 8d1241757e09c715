"""Memory of an optimizer's update, apart from the rest of the step: its states and its temporaries.

Neither depends on the batch or on what layers keep, so a search needs them once for each (optim, lowmem_state,
lowmem_weights), not for each combination with the rest. Ours update parameter by parameter: states are counted over the
whole model without allocating anything (`state_bytes`), and the temporaries are those of the worst parameter, which a
model of a few layers has as well. torch's foreach AdamW has temporaries of all parameters at once, so HuggingFace's
names are simulated with the trainer at two depths, and lie on the line through them.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from hf_lowmem.optim import OPTIMIZERS, from_spec
from hf_lowmem.optim.row_steps import whole_only
from hf_lowmem.planner.allocations import Live
from hf_lowmem.specs import OptimSpec

__all__ = ["Update", "count_states", "head_by_rows", "own_temporaries"]


@dataclass(frozen=True)
class Update:
    """Bytes. states: held by the optimizer; temporaries: of the update, at its highest. head_by_rows: whether it takes
    the gradient of an output head of its own a block of rows at a time."""

    states: int
    temporaries: int
    head_by_rows: bool = False


def count_states(spec: Any, meta: nn.Module) -> int | None:
    """Bytes of the states of our optimizer on a model on the meta device; None where a low-rank rule finds no matrix
    to work on, so that it would save nothing."""
    optimizer = from_spec(spec, meta)
    groups = optimizer.param_groups
    if "rank" in OPTIMIZERS[spec.name].DEFAULTS and all(group["rank"] is None for group in groups):
        return None
    return sum(optimizer.state_bytes(p, group) for group in groups for p in group["params"])


def head_by_rows(spec: OptimSpec, meta: PreTrainedModel) -> bool:
    """Whether our optimizer takes the gradient of the output head by rows, on a model on the meta device."""
    optimizer, head = from_spec(spec, meta), getattr(meta.get_output_embeddings(), "weight", None)
    group = next((g for g in optimizer.param_groups for p in g["params"] if p is head), None)
    return head is not None and group is not None and whole_only(head, optimizer.slot(head, group)) is None


def own_temporaries(spec: Any, model: nn.Module, fake: FakeTensorMode) -> int:
    """Bytes that a step of our optimizer holds beside weights, gradients and states, at most, on a fake model.

    It is called where accelerators' implementations are chosen, or not, for the whole search. The second step counts,
    which finds its states there. A projection is refreshed in it.
    """
    if "update_gap" in OPTIMIZERS[spec.name].DEFAULTS:
        spec = replace(spec, update_gap=1)
    live = Live(invent_numbers=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with fake, live:
        for p in parameters:
            p.grad = torch.empty_like(p)
            p.detach()  # which shows the weight to the log
        optimizer = from_spec(spec, model)
        optimizer.step()
        start = live.clock
        optimizer.step()
        end = live.clock
    for p in parameters:
        p.grad = None
    return _highest(live, start, end) - _alive(live, end)


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
