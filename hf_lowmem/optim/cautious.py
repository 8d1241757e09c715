"""The option `cautious`: no weight moves against its own gradient (arXiv 2411.16085).

A momentum may point where the gradient of this step does not. There the update is left out, and the rest is enlarged
by as much as was left out, so that an update keeps its size. That keeps no state, and any rule that has a momentum can
do it.

    mask    = update * grad > 0
    update *= mask / max(mean(mask), 1e-3)

The mean is the authors', over a whole parameter: of a batch of matrices over each, and of one that FSDP2 has cut over
all processes, which send one number. So an update needs to see all of a parameter: no chunks, and no kernels that know
nothing of it.
"""

import functools
import logging

from torch import Tensor

from hf_lowmem.optim.slot import Slot
from hf_lowmem.optim.state import Group

__all__ = ["cautious_", "warn_left_out", "warn_slower"]

LEAST_SHARE = 1e-3

logger = logging.getLogger(__name__)


def cautious_(update: Tensor, grad: Tensor, slot: Slot, group: Group) -> Tensor:
    """An update, which is to be subtracted, without what does not go down along the gradient; in place."""
    mask = (update.sign() * grad.sign()).clamp_(min=0)
    batch = update.ndim == 3 and bool(group.get("experts") or group.get("rank"))
    if batch:
        share = mask.mean(dim=(-2, -1), keepdim=True)
    else:
        share = slot.shards.sum_(mask.sum()).div_(max(slot.shape.numel(), 1))
    return update.mul_(mask).div_(share.clamp_(min=LEAST_SHARE))


@functools.cache
def warn_slower(method: str) -> None:
    """Say once that a method has no kernel for it."""
    logger.warning(
        "%s with cautious=True: its parameters are stepped by tens of torch operators in place of one kernel, which "
        "does not know that option. The step is several times slower and has fp32 temporaries. Leave it unset for the "
        "kernel.",
        method,
    )


@functools.cache
def warn_left_out(rule: str) -> None:
    """Say once that embedding and output head have a rule that knows nothing of it."""
    logger.warning(
        "cautious=True concerns linear weights and what takes Adam. Embedding and output head take the rule "
        "embeddings=%r, whose update goes on whole. Set embeddings='adam' to have them cautious as well.",
        rule,
    )
