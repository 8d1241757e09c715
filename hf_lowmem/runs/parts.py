"""Parts of a run's memory that are measured: label, colour in a plot, and name in a plan."""

from typing import NamedTuple

__all__ = ["DRAWN", "PARTS", "STATIC", "Part"]


class Part(NamedTuple):
    """One part of what a training step keeps.

    Attributes:
        label: in tables.
        planned: the planner's name of it, where it plans such a part.
        drawn, colour: in pictures; None for a part of another part. Okabe and Ito's colours, which colour-blind readers
            can tell apart too.
    """

    label: str
    planned: str | None
    drawn: str | None
    colour: str | None


PARTS = {
    "weights": Part("weights", "weights", "weights", "#999999"),
    "trainable": Part("of which trained", None, None, None),
    "gradients": Part("gradients", "gradients", "gradients", "#56B4E9"),
    "optimizer": Part("optimizer state", "states", "optimizer state", "#D55E00"),
    "saved": Part("saved for backward", "activations", "saved activations", "#009E73"),
}
STATIC = ("weights", "gradients", "optimizer")  # what is there whatever the batch
DRAWN = tuple(name for name, part in PARTS.items() if part.drawn)
