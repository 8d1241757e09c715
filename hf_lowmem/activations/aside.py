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

__all__ = ["active", "in_checkpoint", "innermost_pack", "reason_to_step_aside", "say_once"]


class _Active(threading.local):
    """State of this thread: `tape` of the layer that runs now; `peeked`, a list while `tape.factors` reads a node."""

    tape: object | None = None
    peeked: list[Any] | None = None


active = _Active()


def innermost_pack() -> Any:
    """The hook that autograd would ask now about a tensor to save, or None. A measuring wrapper is seen through."""
    top = torch._C._autograd._top_saved_tensors_default_hooks(True)  # type: ignore[attr-defined]
    hook: Any = None if top is None else top[0]
    while (inner := getattr(hook, "__wrapped__", None)) is not None:
        hook = inner
    return hook


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
    if torch._C._functorch.peek_interpreter_stack() is not None:  # type: ignore[attr-defined]
        return "it runs inside a transform of torch.func, which has no saved tensors to compress"
    if getattr(forward_ad, "_current_level", -1) >= 0:
        return "it is differentiated forward, and of what is computed again there would be no tangents"
    return None


@functools.lru_cache(maxsize=64)
def say_once(text: str) -> None:
    """Warn, once a process for each text."""
    warnings.warn(text, stacklevel=2)
