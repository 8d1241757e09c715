"""A step of a matrix whose gradient comes a block of rows at a time, and never exists whole.

The largest gradient of a language model is that of its output head, a row for each entry of the vocabulary. A row of it
is complete when all tokens were seen, whatever becomes of the others; so who makes it block by block of rows can have
each block applied, and its memory used again (hf_lowmem/training/head.py).

```python
step = optimizer.step_rows(p, group, finite)
for first in range(0, len(p), rows):
    step.take(first, gradient_of(first, first + rows))   # fp32; `p` has changed there when it returns
step.close()
```

The result has the bits of a step by the whole gradient: that is rounded to the weights' dtype as a `.grad` would be,
codes are cut at whole blocks, and random numbers go by a value's place in the parameter. What is lost with the whole
gradient is the look at all of it before the first value changes: a bad one leaves out its parameter, not some rows of
it. So it must be known beforehand whether the gradient will be finite (`finite`); who makes it can bound it by what it
is made of. Should a part be bad all the same, that part alone is left out, and counted.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_lowmem.kernels.step.reference import is_finite_gradient
from hf_lowmem.optim import chunked
from hf_lowmem.optim.chunked import has_rows, unit_of
from hf_lowmem.optim.fused import step_fused
from hf_lowmem.optim.guard import SkipCount, keep_or_take
from hf_lowmem.optim.linalg import linalg
from hf_lowmem.optim.method import Method
from hf_lowmem.optim.slot import Slot
from hf_lowmem.optim.state import Group

__all__ = ["RowStep", "whole_only"]

Fuses = Callable[[Tensor, Slot, Group, dict[tuple[object, ...], bool]], bool]


def whole_only(p: Tensor, slot: Slot) -> str | None:
    """Why a parameter cannot be stepped by rows, as the end of a sentence; None: it can."""
    if slot.sharded:
        return "its rows lie on several processes"
    if slot.rest is not None:
        return "it is at rest in int8"
    if p.ndim != 2 or not p.is_contiguous():
        return f"it is no matrix that lies in memory row after row (shape {tuple(p.shape)})"
    if slot.reach not in ("value", "row"):
        return f"{slot.rule} needs all of a gradient at once"
    if p.dtype == torch.float16:
        return "in float16 no bound says beforehand that its gradient is finite; load the model in bfloat16"
    return None if has_rows(p, slot) else f"{slot.rule} has a state of it that cannot be cut by its rows"


class RowStep:
    """One step of one parameter, by rows; see the module. `LowMemOptimizer.step_rows` makes it.

    Args:
        method: whose step it is.
        p: a parameter for which `whole_only` is None.
        slot: of it, opened for an update.
        group: of it.
        finite: whether its gradient will be finite and below 1e15, a bool on its device.
        skips: where it is counted if it is left out.
        fuses: whether a kernel makes the step of a part, as `LowMemOptimizer` decides it.
    """

    def __init__(
        self,
        method: Method,
        p: Tensor,
        slot: Slot,
        group: Group,
        finite: Tensor,
        skips: SkipCount,
        fuses: Fuses,
    ) -> None:
        self.method, self.p, self.slot, self.group = method, p.detach(), slot, group
        self.finite, self.taken, self.skips, self.fuses = finite, finite, skips, fuses
        slot.count_step()
        chunked.allocate(self.p, slot)
        self._unit, self._next = unit_of(p, slot), 0
        self._each = chunked.rows_at_once(p, slot)
        self._bad = torch.zeros((), dtype=torch.int64, device=p.device)  # parts that a kernel has left out
        self._runs: dict[tuple[object, ...], bool] = {}
        self._norms: list[Tensor] = []

    def take(self, first: int, grad: Tensor) -> None:
        """Update the rows from `first` on, by their whole gradient (rows, columns), fp32. What is in it is lost.

        Raises:
            ValueError: where it is not the next block, or would cut what belongs together.
        """
        last = first + len(grad)
        if first != self._next or (last % self._unit and last != len(self.p)):
            raise ValueError(
                f"rows {first} to {last} after {self._next} of {len(self.p)}: give them in order, in blocks of a "
                f"multiple of {self._unit}."
            )
        self._next = last
        lows = range(0, len(grad), self._each)
        stepped = chunked.each_of(lows)
        for low in lows:
            part = grad[low : low + self._each].to(self.p.dtype)  # as it would lie in `.grad`
            self._norms.append(linalg.vector_norm(part, dtype=torch.float32))
            if low in stepped:
                self._step(first + low, part)

    def _step(self, first: int, grad: Tensor) -> None:
        if not self.slot.syncs:
            grad = grad.masked_fill_(~self.finite, torch.nan)  # which leaves it out, by whatever makes the step
        elif not self.finite:
            return
        rows, part = chunked.rows_of(self.p, self.slot, first, first + len(grad))
        rows.grad = grad
        if self.method.FUSED is not None and self.fuses(rows, part, self.group, self._runs):
            step_fused(self.method.FUSED, [(rows, part)], self.group, lambda device: self._bad)
            return
        wide = grad.to(torch.float32)
        finite = is_finite_gradient(wide)
        self.taken = self.taken & keep_or_take(self.method, rows, wide, finite, part, self.group)

    def close(self) -> Tensor:
        """End the step, and count it if it was left out or a part of it was; the norm of the whole gradient."""
        assert self._next == len(self.p), f"rows from {self._next} on of {len(self.p)} were not given"
        self.skips.add(self.taken & (self._bad == 0), syncs=self.slot.syncs)
        return linalg.vector_norm(torch.stack(self._norms))
