"""The contract of a method: what a file such as optim/adamw.py says, and nothing of how it is run.

A method is data, and `update` on plain fp32 tensors; it never sees a codec's bytes, a bf16 weight or a NaN. A kernel
that does more than `update` takes the place of `apply`, or of the whole step (`FUSED`, see optim/fused.py).
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_lowmem.optim import roles
from hf_lowmem.optim.fused import FusedStep
from hf_lowmem.optim.slot import Slot
from hf_lowmem.optim.state import Group, Reach, StateDecl
from hf_lowmem.weights import Weights

__all__ = ["METHODS", "Method", "elementwise", "methods_with"]


class Method:
    """One method of optimization."""

    name: ClassVar[str]
    STATES: ClassVar[dict[str, StateDecl]]
    # Options whose default is the method's own. An option that is absent here means nothing to the method.
    DEFAULTS: ClassVar[Group]
    # Of those, the ones that OptimSpec does not know, each with a function (label, value) that raises if it is bad.
    CHECKS: ClassVar[dict[str, Callable[[str, Any], None]]] = {}
    # Facts of the model that the method needs of a parameter (optim/roles.py); each is an option of its group.
    FACTS: ClassVar[tuple[str, ...]] = ()
    # The projections that make sense for the method, if it projects.
    PROJECTIONS: ClassVar[tuple[str, ...]] = ()
    # Whether gradients of low-rank parameters can be added up without keeping them; see `accumulate`.
    ACCUMULATES: ClassVar[bool] = False
    # Whether the update of each value needs that value alone, so that weights may be flattened; see rules/deepspeed.py.
    ELEMENTWISE: ClassVar[bool] = False
    GRADIENTS: ClassVar[bool] = True  # whether it takes gradients, or losses of forward passes
    # The kernel that makes a whole step, value by value, of the parameters that take no low-rank rule.
    FUSED: ClassVar[FusedStep | None] = None
    # Options that decide what the state looks like: a checkpoint made with others cannot be continued.
    STRUCTURAL: ClassVar[tuple[str, ...]] = ("method", "state", "weights", "rank", "projection", "seed", "embeddings")

    def update(self, p: Tensor, grad: Tensor, slot: Slot, group: Group) -> None:
        """Update `p` in place. `p` (fp32, or a parameter in fp64) and `grad` (fp32, finite) are of one shape."""
        raise NotImplementedError

    def apply(self, weights: Weights, grad: Tensor, slot: Slot, group: Group) -> None:
        """Update the weights as they are stored.

        A kernel that reads and writes them itself, and leaves them where `weights.finite` is false, overrides this and
        does not call `weights.load`.
        """
        p = weights.load()
        self.update(p, grad, slot, group)
        weights.save(p)

    def accumulate(self, grad: Tensor, slot: Slot, group: Group) -> None:
        """Add to the state WINDOW what `update` needs of a gradient that is not the last of its accumulation window.

        For methods that say `ACCUMULATES`, of low-rank parameters.
        """
        raise NotImplementedError

    def steps_together(self, p: Tensor, slot: Slot, group: Group, runs: dict[tuple[object, ...], bool]) -> bool:
        """Whether `step_together` makes the step of this low-rank parameter. `runs`: what was found for its kind."""
        return False

    def step_together(
        self, entries: Sequence[tuple[Tensor, Slot]], group: Group, skipped_on: Callable[[torch.device], Tensor]
    ) -> None:
        """One step of low-rank parameters of one group, in calls of many; bad ones are left out.

        Args:
            skipped_on: for a device the number of updates that were left out there, to which they are added.
        """
        raise NotImplementedError

    @classmethod
    def facts(cls, group: Group) -> tuple[str, ...]:
        """Facts in which the parameters of one group must agree, with the options of `group`."""
        return tuple(fact for fact in roles.DEFAULTS if fact in group)

    @classmethod
    def rule(cls, shape: torch.Size, group: Group) -> str:
        """Name of the rule that a parameter of this shape takes: the method's own, or one that it leaves others to."""
        return cls.name

    @classmethod
    def reach(cls, shape: torch.Size, group: Group) -> Reach:
        """Reach of an update: how much of a parameter of this shape each of its values depends on.

        "value": any part of it may be stepped alone, with that part of its states; "row": any rows; "column": any rows,
        once the norms of the whole gradient's columns are known (`Slot.columns`); "whole": no part.
        """
        return "value" if cls.ELEMENTWISE and not group.get("cautious") else "whole"

    @classmethod
    def unsharded_only(cls, shape: torch.Size, group: Group) -> str | None:
        """Why a parameter of this shape cannot be cut by rows (FSDP2), with the remedy. `None`: it can."""
        return None


# Every method by name. Filled by optim/__init__.py, whose files need it for the remedies in their errors.
METHODS: dict[str, type[Method]] = {}


def methods_with(option: str) -> list[str]:
    """Names of the methods to which an option of `OptimSpec` means something."""
    return [name for name, cls in METHODS.items() if option in cls.DEFAULTS]


def elementwise() -> list[str]:
    """Names of the methods that work on weights an engine has flattened and cut."""
    return [name for name, cls in METHODS.items() if cls.ELEMENTWISE and cls.GRADIENTS]
