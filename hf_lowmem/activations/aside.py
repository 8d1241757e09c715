"""Who decides, in this thread and at this moment, what autograd saves.

Of nested saved-tensor hooks autograd asks the innermost only. So a tier that opens its own inside a region which
somebody else looks after (a checkpoint, an offloader) takes away what that was there for, and says nothing. The rule
here is that whoever is innermost decides: a layer inside the user's own `torch.utils.checkpoint` runs as HuggingFace
made it, and so does a part of a layer around which somebody has put hooks of his own.
"""

import functools
import threading
import warnings
from typing import Any

import torch
from torch.autograd import forward_ad

from hf_lowmem.memory.saved import innermost_pack
from hf_lowmem.patching import in_transform

__all__ = ["active", "check_first_derivative", "in_checkpoint", "reason_to_step_aside", "say_once"]


class _Active(threading.local):
    """State of this thread: `tape` of the layer that runs now; `peeked`, a list while `tape.factors` reads a node."""

    tape: object | None = None
    peeked: list[Any] | None = None


active = _Active()


def in_checkpoint() -> bool:
    """Whether torch's non-reentrant checkpoint is what decides here about saved tensors."""
    return getattr(innermost_pack(), "__module__", None) == "torch.utils.checkpoint"


def reason_to_step_aside() -> str | None:
    """Why a layer must run as it is, or None."""
    if in_checkpoint():
        return (
            "it runs inside a torch.utils.checkpoint, whose region is computed again and keeps nothing that could be "
            "compressed. Take the checkpoint away, or leave the tier unset"
        )
    if in_transform():
        return "it runs inside a transform of torch.func, which has no saved tensors to compress"
    if getattr(forward_ad, "_current_level", -1) >= 0:
        return "it is differentiated forward, and of what is computed again there would be no tangents"
    return None


@functools.lru_cache(maxsize=64)
def say_once(text: str) -> None:
    """Warn, once a process for each text."""
    warnings.warn(text, stacklevel=2)


def check_first_derivative(what: str, why: str) -> None:
    """Raise RuntimeError in a backward pass that is to have a graph: what has none would be a constant in a second one.

    Args:
        what: the module whose backward pass this is.
        why: it has no graph.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"create_graph=True asks for a second derivative through {what}, of which there is none: {why}. Leave "
            "create_graph out, or lowmem_activations, with gradient_checkpointing=True for long sequences."
        )
