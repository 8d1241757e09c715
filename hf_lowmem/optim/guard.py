"""Updates that are left out: a bad gradient, or an update that is not finite. Nothing of either reaches a weight.

A finite gradient is no promise. An eigenvalue solver may return NaN without an error, a product of large numbers may
overflow, and what is in a basis or a moment once stays there. So the result is judged too, weights and states, and
taken back as a whole where it is not finite (`keep_or_take`). An asynchronous device is never asked: old and new are
selected by a flag on it.

Adam and Lion, value by value, need no copies to go back to: what they make of finite numbers is finite (`is_bounded`),
so on a CPU, which may be asked first, only their states are judged, before the update (`stays_finite`), by loop or
kernel. Kernels that make whole steps (optim/fused.py) are of these two, and of APOLLO's step, which is given the flag.

How often that happened is counted where it is known (`SkipCount`), and read when somebody asks.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowmem.distributed import local
from hf_lowmem.kernels.step.reference import LARGEST_GRADIENT
from hf_lowmem.optim.method import Method
from hf_lowmem.optim.slot import Slot
from hf_lowmem.optim.state import CORRECTION, Group, is_finite, values_of

__all__ = ["LARGEST_UPDATE", "SkipCount", "Skipped", "keep_or_take", "stays_finite"]

LARGEST_UPDATE = 1e36  # far from the end of fp32


def is_bounded(p: Tensor, slot: Slot, group: Group) -> bool:
    """Whether finite numbers are sure to give a finite update.

    Lion moves by the rate. Adam moves by lr / (1 - beta1) * |m| / eps at most, and |m| is no larger than a gradient may
    be. fp16 is left out, whose weights end at 65504.
    """
    largest = LARGEST_GRADIENT / group["eps"] / (1 - group["betas"][0]) if "eps" in group else 1.0
    return slot.elementwise and p.dtype != torch.float16 and abs(group["lr"]) * max(largest, 1.0) < LARGEST_UPDATE


def stays_finite(p: Tensor, slot: Slot, group: Group) -> bool:
    """Whether a good gradient is sure to give a finite update: a look at the states, which waits for their device."""
    if not is_bounded(p, slot, group):
        return False
    return all(bool(is_finite(local(v))) for v in values_of(slot.raw).values() if v.is_floating_point())


def keep_or_take(method: Method, p: Tensor, grad: Tensor, finite: Tensor, slot: Slot, group: Group) -> Tensor:
    """Update `p` and its state if the gradient is `finite` and the result is; else all stays as it was.

    Returns whether it was taken, on the device. Of a sharded parameter `finite` is what all processes agree on, and the
    result is judged by each for the rows it has.
    """
    raw = slot.raw
    if slot.syncs and stays_finite(p, slot, group) and finite:
        method.apply(slot.weights(p, finite, keep=False), grad, slot, group)
        return finite
    slot.finite = []
    weights = slot.weights(p, finite, keep=True)
    before = {k: local(v).clone() for k, v in values_of(raw).items() if k != CORRECTION}
    method.apply(weights, grad, slot, group)
    after = {k: local(v) for k, v in values_of(raw).items() if k != CORRECTION}
    results = [v for k, v in after.items() if k in slot.states and not slot.states[k].decl.coded]
    taken, judged, slot.finite = finite, slot.finite, None
    for flag in [*judged, *map(is_finite, [weights.here, *results] if weights.before else results)]:
        taken = taken & flag
    if slot.syncs and taken:
        return taken
    weights.undo(taken)
    for k, v in after.items():
        # A state that this very update allocated was zero before it.
        v.copy_(torch.where(taken, v, before[k] if k in before else torch.zeros_like(v)))
    return taken


class Skipped(NamedTuple):
    """Counts of what an optimizer has left out since its run began.

    Args:
        updates: of single parameters.
        steps: in which at least one update was left out.
        in_a_row: of those, the last ones without a step between them in which none was.
    """

    updates: int
    steps: int
    in_a_row: int


class SkipCount:
    """Counts updates that were left out, and the steps that they belong to; nothing waits for a device.

    Args:
        start: what was counted before.
    """

    def __init__(self, start: Skipped) -> None:
        self._host = start
        self._open = 0  # on the host, in the step under way
        self._devices: dict[torch.device, Tensor] = {}  # updates, in all steps
        self._before: Tensor | None = None  # their sum when the last step ended
        self._steps: Tensor | None = None
        self._in_a_row: Tensor | None = None

    def on(self, device: torch.device) -> Tensor:
        """One int64: how many updates were left out on a device. Kernels add to it."""
        if device not in self._devices:
            self._devices[device] = torch.zeros((), dtype=torch.int64, device=device)
        return self._devices[device]

    def add(self, taken: Tensor, *, syncs: bool) -> None:
        """Count an update, unless it was taken. `syncs`: whether asking its device costs nothing."""
        if not syncs:
            self.on(taken.device).add_(~taken)
        elif not taken:
            self._open += 1

    def end_step(self) -> None:
        """End a step: all updates since the last call belong to it."""
        bad_here = self._open > 0
        updates, steps, in_a_row = self._host
        if not self._devices:
            in_a_row = in_a_row + 1 if bad_here else 0
            self._host, self._open = Skipped(updates + self._open, steps + bad_here, in_a_row), 0
            return
        self._host, self._open = Skipped(updates + self._open, steps, in_a_row), 0
        home = min(self._devices, key=lambda device: device.type == "cpu")  # an accelerator, where there is one
        total = torch.stack([t.to(home, non_blocking=True) for t in self._devices.values()]).sum()
        if self._before is None or self._steps is None or self._in_a_row is None:
            self._before, self._steps = torch.zeros_like(total), torch.zeros_like(total)
            self._in_a_row = torch.full_like(total, in_a_row)
        bad = (total > self._before) | bad_here
        self._steps.add_(bad)
        self._in_a_row.add_(1).mul_(bad)
        self._before = total

    def read(self) -> Skipped:
        """The numbers after the last step that ended. Asks the devices."""
        updates, steps, _ = self._host
        if self._before is None or self._steps is None or self._in_a_row is None:
            return self._host
        return Skipped(updates + int(self._before), steps + int(self._steps), int(self._in_a_row))
