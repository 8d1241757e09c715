"""FZOO: one-sided probes along signs, and a step that the spread of their losses normalises."""

import math
from typing import ClassVar

from torch import Tensor

from hf_lowmem.optim.slot import Slot
from hf_lowmem.optim.state import Group, StateDecl
from hf_lowmem.optim.zeroth.estimate import Point, ZerothOrder
from hf_lowmem.optim.zeroth.settings import COMMON, PROBING
from hf_lowmem.specs import check_integer

__all__ = ["Fzoo"]

LEAST_SPREAD = 1e-8  # of losses: below it they are equal up to rounding, and say nothing


def check_several(label: str, value: object) -> None:
    """Raise unless there are directions enough for a standard deviation."""
    check_integer(label, value, low=2)


class Fzoo(ZerothOrder):
    """FZOO (arXiv 2506.09034): MeZO with many cheap probes and a step of a known length.

    ```python
    l0     = loss(p)
    l[i]   = loss(p + eps * z[i])                        # z[i] of signs, -1 or 1
    u      = mean((l[i] - l0) / eps * z[i])
    p     -= lr * (u / std(l) + weight_decay * p)        # std over the probes, with N - 1
    ```

    Where the losses spread by less than 1e-8 nothing is moved but by decay. One forward pass at the weights, and one
    for each probe: 9 by default. Defaults: perturbation 1e-3, probes 8 (the number is not from the paper's text, which
    was not at hand; check it against your own runs). State: none.

    Recommended: tune the learning rate. u / std is about sqrt(probes) / (probes * perturbation) in size, so
    lr / perturbation is the step: begin with lr = perturbation * 1e-4 to 1e-3. Its authors report MeZO's accuracy at a
    third of the passes. Not for you in bf16 logits with a tiny perturbation: the spread is then that of rounding, and
    the step does not get smaller with it; nor where a backward pass fits.
    """

    name = "fzoo"
    DIRECTION = "signs"
    STATES: ClassVar[dict[str, StateDecl]] = {}
    DEFAULTS: ClassVar[Group] = COMMON | {"probes": 8}
    CHECKS = PROBING | {"probes": check_several}

    def points(self) -> list[Point]:
        return [Point(None, 0.0), *(Point(probe, 1.0) for probe in range(self.probes))]

    def differences(self, losses: list[float]) -> list[float]:
        here, there = losses[0], losses[1:]
        mean = sum(there) / len(there)
        spread = math.sqrt(sum((loss - mean) ** 2 for loss in there) / (len(there) - 1))
        if spread < LEAST_SPREAD:
            return [0.0] * len(there)
        return [(loss - here) / (len(there) * spread) for loss in there]

    def update(self, p: Tensor, grad: Tensor, slot: Slot, group: Group) -> None:
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(grad.to(p.dtype).mul_(group["lr"]))
