"""TRL's card, where it would say what is not so: of a model that has no name on the hub, and of a loss that is not DPO.

The card is text made from TRL's template. Where a later template says it otherwise, nothing is found and nothing is
changed.
"""

import inspect
import re
from collections.abc import Sequence

from hf_lowmem.preference.losses import PREFERENCE_LOSSES

__all__ = ["mended"]

NAMELESS = "[None](https://huggingface.co/None)"
FOLDER = "path/to/this/folder"
_TRAINED = re.compile(r"This model was trained with DPO(?:, a method introduced in \[[^\]]*\]\([^)]*\))?\.")
_CITED = re.compile(r"Cite DPO as:\n\s*```bibtex\n.*?```\n+", re.DOTALL)
_PAPER = re.compile(r"Source: arXiv (\d{4}\.\d{5})")


def mended(card: str, *, model: str | None, losses: Sequence[str]) -> str:
    """The card with a model that can be loaded as it says, and the losses that were trained.

    Args:
        card: as TRL has made it.
        model: name of the folder that the model came from; None where it was made in memory.
        losses: of preference training; none where it is other training.
    """
    base = f"`{model}`, a model from a folder" if model else "a model that was made in memory"
    card = card.replace(NAMELESS, base).replace('model="None"', f'model="{FOLDER}"')
    ours = [name for name in losses if name in PREFERENCE_LOSSES]
    if ours:
        theirs = [f"DPO ({name})" for name in losses if name not in PREFERENCE_LOSSES]
        trained = " and ".join([*theirs, *map(_cited, ours)])
        card = _TRAINED.sub(f"This model was trained with {trained}, by TRL's DPOTrainer.", card)
        card = card if theirs else _CITED.sub("", card)
    return re.sub(r"\n[ \t]*(?:\n[ \t]*){2,}\n", "\n\n", card)


def _cited(loss: str) -> str:
    """A loss's name, and the paper that its docstring names."""
    found = _PAPER.search(inspect.getdoc(PREFERENCE_LOSSES[loss]) or "")
    return loss.upper() + (f" ([arXiv {found[1]}](https://huggingface.co/papers/{found[1]}))" if found else "")
