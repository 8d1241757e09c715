"""The rule of embedding and output head, where a method's own is for linear weights; and AdamW for all that is left.

An 8B model's embedding and head are an eighth of its weights, but with a method that keeps next to nothing of linear
weights their AdamW states are almost all there is: 2 GiB in 8 bits. The option `embeddings` gives them another rule:

    "adam"         the moments that all else has
    "scale"        the embedding: none; the head: a first moment
    "adam_mini"    a first moment, and one number a token

A tied weight is the head's. Methods that have the option take states from here (`other_states`) and hand over what is
not theirs (`update_other`).
"""

from collections.abc import Callable

from torch import Tensor

from hf_lowmem.optim.rows import mini_, scale_lookup_, square_shape
from hf_lowmem.optim.slot import Slot
from hf_lowmem.optim.state import Group, Reach, Shape, StateDecl

__all__ = ["other_reach", "other_rule", "other_states", "update_other"]

OwnShape = Callable[[Shape, Group], Shape | None]


def other_rule(group: Group) -> str:
    """Name of the rule of a parameter that a method leaves to others."""
    return group["embeddings"] if group.get("role") in ("embedding", "head") else "adam"


def other_reach(group: Group) -> Reach:
    """Reach of an update of such a parameter."""
    rule = other_rule(group)
    if rule == "scale":
        return "row" if group["role"] == "head" else "whole"
    return "value" if rule == "adam" else "row"


def other_states(owns: Callable[[Shape, Group], bool]) -> dict[str, StateDecl]:
    """States of the parameters that a method leaves to others. `owns`: which it does not."""

    def of_others(shape_of: OwnShape) -> OwnShape:
        return lambda shape, group: None if owns(shape, group) else shape_of(shape, group)

    def first(shape: Shape, group: Group) -> Shape | None:
        return None if other_rule(group) == "scale" and group["role"] == "embedding" else shape

    def second(shape: Shape, group: Group) -> Shape | None:
        return shape if other_rule(group) == "adam" else None

    def of_rows(shape: Shape, group: Group) -> Shape | None:
        return square_shape(shape, group) if other_rule(group) == "adam_mini" else None

    return {
        "exp_avg": StateDecl(signed=True, shape=of_others(first)),
        "exp_avg_sq": StateDecl(signed=False, shape=of_others(second)),
        # A few numbers, never coded: no rounding moves a whole row.
        "row_sq": StateDecl(signed=False, shape=of_others(of_rows), coded=False),
    }


def update_other(p: Tensor, grad: Tensor, slot: Slot, group: Group) -> None:
    """A step by the rule "scale" or "adam_mini"; see `Method.update`."""
    if slot.rule == "scale":
        scale_lookup_(p, grad, slot, group)
    else:
        mini_(p, grad, slot, group)
