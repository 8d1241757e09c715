"""Weights at rest in int8, in an estimate: what they save of the simulated weights, and what a layer decodes.

The passes are simulated with weights as they are loaded, once for all candidates. At rest a weight takes a byte and its
scales instead, which is counted on a model without values; while a layer runs, the largest of its weights is there in
bf16 as well.
"""

from dataclasses import dataclass

from transformers import PreTrainedModel

from hf_lowmem.activations.detect import find_stack
from hf_lowmem.optim.resting import rest
from hf_lowmem.planner.models import shapes_of
from hf_lowmem.specs import OptimSpec

__all__ = ["Rested", "rested"]


@dataclass(frozen=True)
class Rested:
    """model: on the meta device, at rest; saved, decoded: bytes less in all, and more while a layer runs."""

    model: PreTrainedModel
    saved: int
    decoded: int


def rested(spec: OptimSpec, model: PreTrainedModel) -> Rested:
    """Put a model on the meta device to rest.

    Raises:
        ValueError: where none of its weights can be.
    """
    stack = find_stack(model)[0]
    before = shapes_of(model, stack)
    rest(spec, model)
    after = shapes_of(model, stack)
    asleep = [old for old, new in zip(before, after, strict=True) if new.itemsize < old.itemsize]
    return Rested(
        model,
        saved=sum(s.nbytes for s in before) - sum(s.nbytes for s in after),
        decoded=max((s.nbytes for s in asleep if s.layer is not None), default=0),
    )
