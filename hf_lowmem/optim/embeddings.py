"""The rule of embedding and output head, where a method's own is for linear weights; and AdamW for all that is left.

An 8B model's embedding and head are an eighth of its weights, but with a method that keeps next to nothing of linear
weights their AdamW states are almost all there is: 2 GiB in 8 bits. The option `embeddings` gives them another rule:

    "adam"         the moments that all else has
    "scale"        the embedding: none; the head: a first moment
    "adam_mini"    a first moment, and one number a token

A tied weight is the head's. Methods that have the option take their states from here (`STATES`) and hand over what is
not theirs (`update_other`).
"""

from torch import Tensor

from hf_lowmem.optim.rows import mini_, scale_lookup_, square_shape
from hf_lowmem.optim.slot import Slot
from hf_lowmem.optim.state import Group, Reach, Shape, StateDecl

__all__ = ["ROW_SQ", "first_shape", "other_reach", "other_rule", "second_shape", "update_other"]


def other_rule(group: Group) -> str:
    """Name of the rule of a parameter that a method leaves to others."""
    return group["embeddings"] if group.get("role") in ("embedding", "head") else "adam"


def other_reach(group: Group) -> Reach:
    """How far an update of such a parameter sees."""
    rule = other_rule(group)
    if rule == "scale":
        return "row" if group["role"] == "head" else "whole"
    return "value" if rule == "adam" else "row"


def first_shape(shape: Shape, group: Group) -> Shape | None:
    """Shape of its first moment, where it has one."""
    return None if other_rule(group) == "scale" and group["role"] == "embedding" else shape


def second_shape(shape: Shape, group: Group) -> Shape | None:
    """Shape of its second moment, where it has one for each value."""
    return shape if other_rule(group) == "adam" else None


def row_shape(shape: Shape, group: Group) -> Shape | None:
    """Shape of its second moment, where it has one for each row."""
    return square_shape(shape, group) if other_rule(group) == "adam_mini" else None


# One second moment a row is a few numbers: never coded, so that no rounding moves a whole row.
ROW_SQ = StateDecl(signed=False, shape=row_shape, coded=False)


def update_other(p: Tensor, grad: Tensor, slot: Slot, group: Group) -> None:
    """A step by the rule "scale" or "adam_mini"; see `Method.update`."""
    if slot.rule == "scale":
        scale_lookup_(p, grad, slot, group)
    else:
        mini_(p, grad, slot, group)
