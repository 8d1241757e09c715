"""APOLLO's step of many matrices: those of one shape share each launch, and nothing of a gradient's size is kept.

What is left to a matrix alone is its projection: a basis that is drawn, and a product. Everything after that, Adam's
direction, the factors of channels, the moments and the weights, is one launch for all matrices of one shape, so far as
their projections, fp32, take no more than `VALUES`. Nothing is written before it is known that all of an update is
finite: each kernel clears a flag on the device, and those that write read it.

A matrix alone, as in a step in backward, takes the same kernels, which sum in the same order in any company.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowmem.kernels.apollo import APOLLO_FACTORS, APOLLO_STEP
from hf_lowmem.kernels.moments import ADAM_DIRECTION, ADAM_MOMENTS
from hf_lowmem.kernels.step.flags import fresh_flag
from hf_lowmem.optim.fused import call_directly
from hf_lowmem.optim.guard import LARGEST_UPDATE
from hf_lowmem.optim.lowrank.projector import PROJECTORS, projected_shape
from hf_lowmem.optim.slot import Slot
from hf_lowmem.optim.state import Group, in_dispatch_mode

__all__ = ["rescale", "step_together"]

# Of projections at once: 64 MiB, and as much of directions. An 8B model with rank 256 has thirty times that.
VALUES = 1 << 24
MATRICES = (1 << 16) - 1  # at once: no grid is longer in its second dimension
FLOAT_MAX = torch.finfo(torch.float32).max
MOMENTS = "exp_avg", "exp_avg_sq"

Entries = Sequence[tuple[Tensor, Slot]]


class _Kind(NamedTuple):
    """All by which one matrix's calls differ from another's of the same group."""

    device: torch.device
    dtype: torch.dtype
    grad_dtype: torch.dtype
    shape: torch.Size
    codecs: tuple[str, str]


def step_together(
    entries: Entries, group: Group, skipped_on: Callable[[torch.device], Tensor], *, per_channel: bool
) -> None:
    """One step of plain matrices of one group with a basis that is drawn; bad ones are left out and counted.

    Args:
        skipped_on: for a device the number of updates that were left out there.
        per_channel: whether each channel has a factor, or (Mini) a matrix.
    """
    kinds: dict[_Kind, list[tuple[Tensor, Slot]]] = {}
    for p, slot in entries:
        assert p.grad is not None
        first, second = (slot.states[name].codec.name for name in MOMENTS)
        kind = _Kind(slot.device, p.dtype, p.grad.dtype, p.shape, (first, second))
        kinds.setdefault(kind, []).append((p, slot))
    for kind, members in kinds.items():
        most = min(VALUES // projected_shape(kind.shape, group["rank"]).numel(), MATRICES // kind.shape[:-2].numel())
        most = max(most, 1)
        for start in range(0, len(members), most):
            _step(members[start : start + most], kind, group, skipped_on(kind.device), per_channel)


def _step(entries: Entries, kind: _Kind, group: Group, skipped: Tensor, per_channel: bool) -> None:
    """One step of matrices of one kind."""
    slots = [slot for _, slot in entries]
    for slot in slots:
        slot.count_step()
    grads = [p.grad.contiguous() for p, _ in entries if p.grad is not None]
    projected = _project(grads, slots, group)
    alone = len(slots) == 1 and not in_dispatch_mode()  # one that is kept for the next may not be of a mode
    finite = fresh_flag(kind.device)[:1] if alone else torch.ones(len(slots), dtype=torch.int32, device=kind.device)
    first, second = ([t for slot in slots for t in slot.tensors(name)] for name in MOMENTS)
    moments = first, second, *kind.codecs
    seeds = [slot.state_seed for slot in slots] if slots[0].dithers else []
    direction = call_directly(
        ADAM_DIRECTION, kind.device, kind, projected, finite, *moments, *group["betas"], group["eps"]
    )
    rescale(entries, grads, projected, direction, finite, skipped, group, per_channel=per_channel)
    call_directly(ADAM_MOMENTS, kind.device, kind, projected, finite, *moments, seeds, *group["betas"])


def _project(grads: list[Tensor], slots: list[Slot], group: Group) -> Tensor:
    """The projections of gradients of one shape, fp32 (k, ...)."""
    shape = projected_shape(grads[0].shape, group["rank"])
    projected = grads[0].new_empty((len(grads), *shape), dtype=torch.float32)
    for grad, slot, out in zip(grads, slots, projected.unbind(), strict=True):
        wide = grad.to(torch.float32)
        kind = PROJECTORS[group["projection"]]
        kind(wide, slot, group, slot.step - 1, projects_back=False).project(wide, out=out)
    return projected


def rescale(
    entries: Entries,
    grads: list[Tensor],
    projected: Tensor,
    direction: Tensor,
    finite: Tensor,
    skipped: Tensor,
    group: Group,
    *,
    per_channel: bool,
) -> None:
    """Step weights of one shape by their rescaled gradients, unless something is not finite: then clear their flags.

    Args:
        projected, direction: R and Adam's N of each, fp32 (k, ...), contiguous.
        finite: int32 (k,), flags of those that may be stepped.
        skipped: one int64, to which the number of those that are not is added.
    """
    params, slots = [p for p, _ in entries], [slot for _, slot in entries]
    slot, store = slots[0], slots[0].store
    # No value of an update is larger than its norm, so weights stay finite without a copy to go back to: `reach` is
    # inf from LARGEST_UPDATE on.
    reach = abs(group["lr"]) * math.sqrt(group["scale"]) / (1 - group["betas"][0]) * (FLOAT_MAX / LARGEST_UPDATE)
    last = [slot.load("prev_norm") for slot in slots]
    kind = params[0].dtype, grads[0].dtype, params[0].ndim, store.name, per_channel
    found = call_directly(
        APOLLO_FACTORS, slot.device, kind, grads, projected, direction, finite, last, per_channel, reach
    )
    corrections = [slot.correction(p) for p, slot in entries] if store.corrected else []
    seeds = [slot.weight_seed for slot in slots] if store.draws else []
    settings = group["scale"], group["lr"], *group["betas"], group["weight_decay"]
    steps = [slot.step for slot in slots]
    stored = params, grads, corrections, finite, skipped, last
    call_directly(APOLLO_STEP, slot.device, kind, *stored, *found, seeds, steps, *settings)
    torch.autograd.graph.increment_version(params)
