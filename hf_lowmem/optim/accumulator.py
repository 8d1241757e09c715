"""Gradients of several backward passes, added up in int8: one byte a parameter, where a gradient takes two or four.

Step in backward frees each gradient in the pass that made it. With gradient accumulation only the last pass of a window
makes an update, so what the others have found must be kept. Here it is kept as the weights at rest are
(hf_lowmem/weights/int8.py): codes, and one scale for a group of 128.

```python
sum = decode(codes, scale) + grad                        # fp32, a span at a time
codes, scale = encode(sum)                               # in every pass but the last: rounded up or down at random
p.grad = decode(codes, scale) + p.grad                   # in the last, whose own gradient is never encoded
```

**No bias.** A code is rounded up with the probability of its fraction, so the expectation of the sum is the sum,
whatever was added before. Rounded to the nearest, what is small beside the sum would be lost in every pass. The random
numbers are a function of the parameter's key, its step, the number of the pass and a value's place: a run that is saved
and resumed inside a window draws the same.

**The error.** A code is a 127th of its group's largest value, which for a normal distribution is 2.7 standard
deviations: one rounding errs by 0.9 % of a value's standard deviation, and k passes round k - 1 times. For gradients
that have nothing in common the sum errs by 0.9 % * sqrt((k - 1) / 2) of itself (measured: scripts/bench/README.md).

**Why not bf16**, which errs less: it takes twice the bytes, what the gradient itself would take. **Why not 4 bits:**
their error is sixteen times as large, half of the gradient's own size after a few passes.

The sum is part of the parameter's state while its window is open, so that a checkpoint may fall anywhere. After the
window nothing of it is left.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_lowmem.kernels.spans import spans
from hf_lowmem.optim.slot import SMALLEST_COMPRESSED, Slot
from hf_lowmem.optim.state import ADDED, WINDOW, count, number, stream_key
from hf_lowmem.weights import int8

__all__ = ["LEFT", "add", "empty", "forget", "is_open", "nbytes", "take", "takes"]

CODES, SCALE = "gradients.codes", "gradients.scale"
LEFT = (
    "the optimizer's state holds gradients of an accumulation that was not ended, as a checkpoint does that was saved "
    "in the middle of one. Make hf_lowmem.optim.StepInBackward(optimizer, ...) before the next step, which takes them, "
    "or drop them by optimizer.zero_grad()."
)
# The largest value of a group has this code, or the next, as it was encoded. So a gradient of zero leaves its scale and
# its codes, and any other derives the scale that fits the new sum best.
BOTTOM = int8.TOP - 1


def group_of(values: int) -> int | None:
    """Values that share a scale in a parameter of so many; None where it keeps its gradient as it is.

    Those are small ones, and those whose number has no power of two from 32 on in it.
    """
    return int8.group_of(torch.Size([values])) if values >= SMALLEST_COMPRESSED else None


def nbytes(values: int) -> int | None:
    """Bytes of the sum of a parameter of so many values; None where it keeps its gradient."""
    group = group_of(values)
    return None if group is None else int8.nbytes(values, group)


def empty(values: int, device: torch.device | str) -> dict[str, Tensor]:
    """The tensors of a sum of nothing, under the names that they have in a state; none where there is no sum."""
    group = group_of(values)
    if group is None:
        return {}
    scale = torch.full((values // group,), int8.TINY, dtype=torch.float32, device=device)
    return {CODES: torch.zeros(values, dtype=torch.int8, device=device), SCALE: scale}


def is_open(raw: Mapping[str, object] | None) -> bool:
    """Whether a parameter's state, or None, holds a sum."""
    return raw is not None and ADDED in raw


def takes(slot: Slot) -> bool:
    """Whether gradients of a parameter are added up here; it keeps them otherwise."""
    return group_of(slot.values) is not None and not slot.sharded


def add(grad: Tensor, slot: Slot) -> None:
    """Add a gradient to the sum in the slot's state, which is open for an update, of a parameter that it `takes`."""
    group, raw = group_of(grad.numel()), slot.raw
    assert group is not None
    if not is_open(raw):
        raw.update(empty(grad.numel(), grad.device), **{ADDED: count(0)})
    added = number(raw[ADDED])
    raw[ADDED] = count(added + 1)
    seed, flat, codes, scale = stream_key(slot.key, "gradients", slot.step, added), grad.reshape(-1), *_of(raw)
    for start, stop in spans(grad.numel(), group, grad.device):
        of_part = codes[start:stop], scale[start // group : stop // group]
        part = int8.decode(*of_part, torch.Size([stop - start]), torch.float32, group=group).add_(flat[start:stop])
        int8.encode_(part, *of_part, group=group, seed=seed, first=start, bottom=BOTTOM)


def take(p: Tensor, raw: dict[str, Tensor]) -> None:
    """Add the sum to `p.grad`, the window's last gradient or None, and leave none in the state."""
    if not is_open(raw):
        return
    codes, scale = _of(raw)
    group = codes.numel() // scale.numel()
    grad = torch.zeros(p.shape, dtype=p.dtype, device=p.device) if p.grad is None else p.grad.detach().contiguous()
    flat = grad.view(-1)
    for start, stop in spans(flat.numel(), group, flat.device):
        of_part = codes[start:stop], scale[start // group : stop // group]
        flat[start:stop].add_(int8.decode(*of_part, torch.Size([stop - start]), torch.float32, group=group))
    p.grad = grad
    drop(raw)


def drop(raw: dict[str, Tensor]) -> None:
    """Forget the sum."""
    for name in (CODES, SCALE, ADDED):
        raw.pop(name, None)


def forget(raw: dict[str, Tensor]) -> None:
    """Forget every sum of gradients in a parameter's state, as `zero_grad` does: of projections, too."""
    raw.pop(WINDOW, None)
    drop(raw)


def _of(raw: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    return raw[CODES], raw[SCALE]
