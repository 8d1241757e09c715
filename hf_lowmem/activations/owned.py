"""Tiers that belong to somebody: a training puts them on a model, and takes them off when it ends, however it ends.

What a user converts by hand is his: a training that has tiers of its own puts it aside in words, and back at its end.
"""

import contextlib
import logging
import weakref
from collections.abc import Iterator

from torch import nn

from hf_lowmem.activations.blocks import Patch, patches, put_back, take_out
from hf_lowmem.activations.checkpoint import WrappedForward
from hf_lowmem.activations.convert import convert
from hf_lowmem.activations.ends import NO_NORM, norms_beside
from hf_lowmem.activations.report import Report
from hf_lowmem.activations.seeds import Seeds
from hf_lowmem.activations.streaming.masks import MaskMaker
from hf_lowmem.specs import ActivationSpec

__all__ = ["OwnedTiers", "owners_of", "rehearsal"]

logger = logging.getLogger(__name__)

# Whose a forward is: what to call the owner, and the owner, while it lives. A copy of a model belongs to nobody.
_OWNERS: "weakref.WeakKeyDictionary[Patch | WrappedForward | MaskMaker, tuple[str, weakref.ref[OwnedTiers]]]" = (
    weakref.WeakKeyDictionary()
)


class OwnedTiers:
    """A conversion that can be taken off again as a whole.

    Args:
        model: converted in place, as by `convert`.
        spec: which layer gets which tier.
        owner: whose it is, in the user's words, such as "lowmem_activations='fp8' of LowMemTrainer".

    Another owner's tiers that are still there are taken off, with a warning; a conversion by hand is put aside.
    """

    def __init__(self, model: nn.Module, spec: ActivationSpec, owner: str) -> None:
        self.model, self.owner = model, owner
        for name, other in owners_of(model).items():
            logger.warning(
                "%s: this model still has the tiers of %s, which has not ended, or has ended in an exception. They "
                "are taken off.",
                owner,
                name,
            )
            if other is not None:
                other.take_off()
        stray = [patch for patch in patches(model) if patch in _OWNERS]  # their owner is gone
        by_hand = [patch for patch in take_out(model) if patch not in stray]
        try:
            self.report = convert(model, spec)
            norms = norms_beside(model, self.report)
            for norm in norms or ():
                norm.put()
        except BaseException:
            put_back(by_hand)
            raise
        if norms == []:
            self.report.notes.append(NO_NORM)
        self._aside, self._ours = by_hand, list(patches(model))
        for patch in self._ours:
            _OWNERS[patch] = owner, weakref.ref(self)
        if by_hand:
            logger.warning(
                "%s: this model was converted by hand (%s). That is put aside for this training, and back at its end.",
                owner,
                ", ".join(sorted({tier for patch in by_hand if (tier := getattr(patch, "tier", None))})),
            )

    def at_step(self, step: int) -> None:
        """Say at which step of training the next forward passes are; see `convert.at_step`."""
        for patch in self._ours:
            if isinstance(seeds := getattr(patch, "seeds", None), Seeds):
                seeds.at(step)

    def take_off(self) -> None:
        """Leave the model as it was found. Does nothing the second time."""
        ours, self._ours = self._ours, []
        present = list(patches(self.model))
        if lost := [patch for patch in ours if patch not in present and is_wrapped_over(patch)]:
            logger.warning(
                "%s: the forward of %d modules (%s) was replaced after they were converted, so the tiers stay there. "
                "Take that away, then call hf_lowmem.activations.undo(model).",
                self.owner,
                len(lost),
                type(lost[0].module).__name__,
            )
        others = [patch for patch in take_out(self.model) if patch not in ours]
        # A conversion by hand during the training takes the place of the one before it.
        put_back(others or self._aside)
        self._aside = []


def is_wrapped_over(patch: Patch | WrappedForward | MaskMaker) -> bool:
    """Whether somebody else's forward stands where this one was put."""
    return vars(patch.module).get("forward") not in (None, patch.inner)


def owners_of(model: nn.Module) -> dict[str, OwnedTiers | None]:
    """Owners of a model's tiers, by name; None for an owner that is gone. Conversions by hand are not listed."""
    found = (_OWNERS.get(patch) for patch in patches(model))
    return {name: owner() for name, owner in filter(None, found)}


@contextlib.contextmanager
def rehearsal(model: nn.Module, spec: ActivationSpec) -> Iterator[Report]:
    """A conversion for as long as the block runs: to see what it would do, or the error that it would raise."""
    before = take_out(model)
    try:
        yield convert(model, spec)
    finally:
        take_out(model)
        put_back(before)
