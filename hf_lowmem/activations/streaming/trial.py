"""A layer is tried once: a few of its first tokens, whole and in two chunks, must give the same.

Structure tells much (`able`), but not that a layer does not shift tokens, smooth them or count them in its own way.
Such a layer would compute something else in chunks, and nobody would see it. So before its first pass a layer runs on
the first tokens of what it is given, with dropouts off and without moving a random generator. What differs by rounding
alone passes; what a token loses with the chunk before it is a part of what the layer adds to it.

Of a routed layer single tokens may differ: near a tie, rounding chooses another expert.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hf_lowmem.activations.detect import is_linear, routing_of
from hf_lowmem.activations.draws import undrawn
from hf_lowmem.patching import in_eval_mode

__all__ = ["TOKENS", "check_by_trial"]

TOKENS = 16
# A difference may be as large as this part of what the layer adds: in bf16, and in fp32 (whose products may be TF32's).
HALF, FULL = 2.0**-5, 2.0**-9
ROUTED = 4  # of a routed layer, as this part of the tokens may differ


def check_by_trial(
    module: nn.Module, hidden: Tensor, whole: Callable[[], object], chunks: Callable[[], Tensor]
) -> None:
    """Compare a layer's output with that of chunks.

    Args:
        module: the layer.
        hidden: its input, (rows, tokens, hidden).
        whole: runs the layer on it.
        chunks: runs the layer on it in chunks.

    Raises:
        ValueError: where they differ by more than rounding.
    """
    with torch.no_grad(), undrawn(hidden.device), in_eval_mode(module, but=_stays_in_training):
        out = whole()
        out = out[0] if isinstance(out, tuple) else out
        assert isinstance(out, Tensor)
        expected, found = out.double(), chunks().double()
    half = torch.is_autocast_enabled(hidden.device.type) or hidden.dtype.itemsize == 2
    rounding = torch.finfo(torch.bfloat16 if half else torch.float32).eps
    part = HALF if half else FULL
    allowed = part * (expected - hidden.double()).norm(dim=-1) + rounding * expected.norm(dim=-1)
    wrong = ((found - expected).norm(dim=-1) > allowed).double().mean().item()
    if wrong > (1 / ROUTED if routing_of(module) else 0):
        raise ValueError(
            f"{type(module).__name__} cannot be streamed: on {hidden.shape[1]} tokens it gives something else in two "
            "chunks than whole, so it mixes tokens by other means than attention. Use "
            "lowmem_activations='checkpoint_fp8' for it."
        )


def _stays_in_training(module: nn.Module) -> bool:
    """Linear layers of quantised weights do the same in training, or leave it for good: bitsandbytes' pack their
    weights anew on a CPU, for products without a backward pass. Others may draw, as a router that is one does."""
    return is_linear(module) and type(getattr(module, "weight", None)) is not nn.Parameter
