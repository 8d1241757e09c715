"""One step of one parameter by the loop: decode the state, `update`, encode it again; a bad gradient is left out."""

import torch
from torch import Tensor

from hf_lowmem.distributed import local
from hf_lowmem.kernels.step.reference import is_finite_gradient
from hf_lowmem.optim.chunked import can_chunk, step_chunks
from hf_lowmem.optim.guard import SkipCount, keep_or_take
from hf_lowmem.optim.method import Method
from hf_lowmem.optim.slot import Slot
from hf_lowmem.optim.state import WINDOW, Group, values_of

__all__ = ["step_by_loop"]


def step_by_loop(method: Method, p: Tensor, slot: Slot, group: Group, skips: SkipCount, finite: Tensor | None) -> None:
    """Update a parameter that has values and a dense gradient.

    Args:
        finite: of a sharded parameter, whether its gradient is good on all processes.
    """
    assert p.grad is not None
    slot.count_step()
    if can_chunk(p, slot):
        step_chunks(method, p, slot, group, skips)
        return
    raw, grad = slot.raw, local(p.grad).to(torch.float32)
    if finite is None:
        finite = is_finite_gradient(grad)
        if WINDOW in raw:
            finite &= is_finite_gradient(raw[WINDOW])
    if slot.syncs and not finite and values_of(raw).keys() - {WINDOW}:
        raw.pop(WINDOW, None)  # and no update is made to be undone, but for the first, which allocates the states
    else:
        finite = keep_or_take(method, p, grad, finite, slot, group)
    skips.add(finite, syncs=slot.syncs)
