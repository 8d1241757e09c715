"""Fira: GaLore, and a step in what GaLore leaves out.

A gradient is its projection plus a residual. GaLore drops the residual, and with it full-rank training. Fira keeps it
without keeping moments for it: Adam enlarges the projection by some factor per channel, and the residual is enlarged by
the same factor. A limit on how fast its norm may grow takes the place of Adam's smoothing.
"""

from typing import Any, ClassVar

from torch import Tensor

from hf_lowmem.optim.lowrank.family import PREVIOUS_NORM, SHARED, LowRankOptimizer
from hf_lowmem.optim.lowrank.galore import GaLore
from hf_lowmem.optim.lowrank.pipeline import growth_of_
from hf_lowmem.optim.lowrank.projector import Projector
from hf_lowmem.optim.slot import Slot
from hf_lowmem.optim.state import OVERLAP, Group
from hf_lowmem.specs import check_flag


def fira_update(
    grad: Tensor,
    projected: Tensor,
    direction: Tensor,
    projector: Projector,
    prev_norm: Tensor,
    *,
    scale: float,
    removed: float,
) -> Tensor:
    """The update of a matrix: scale * back(N) + limit_growth((grad - removed * back(R)) * phi).

    Args:
        grad: (..., m, n).
        projected: the projected gradient R, as the projector gave it.
        direction: Adam's direction N for it, of the same shape.
        projector: projects both back.
        prev_norm: (...), norm of the last residual; changed in place.
        scale: factor on the direction that is projected back.
        removed: how much of its projection the residual lacks: 1 in the paper, `scale` in the authors' code.
    """
    residual = grad.sub(projector.project_back(projected), alpha=removed)
    residual.mul_(projector.channel_scale(direction, projected))
    residual.div_(growth_of_(residual, prev_norm, projector.shards)[..., None, None])
    return residual.add_(projector.project_back(direction), alpha=scale)


class Fira(LowRankOptimizer):
    """Fira (arXiv 2410.01623, algorithm 1).

    ```python
    # grad (m, n), m >= n; P (n, r), R, m, v and N as in GaLore
    phi = norm(N, dim=1) / (norm(R, dim=1) + 1e-8)           # (m,), one factor a channel
    E = (grad - R @ P.T) * phi[:, None]                      # authors_residual: grad - scale * R @ P.T
    E = E / (max(norm(E) / (prev + 1e-8), 1.01) / 1.01)      # norm grows by at most 1 %
    prev = norm(E)
    p -= lr * sqrt(1 - beta2**(t+1)) / (1 - beta1**(t+1)) * (scale * N @ P.T + E)
    p -= lr * weight_decay * p
    ```

    Applies to the same parameters as `galore`.

    State: GaLore's 2 * r * max(m, n) + r * min(m, n) values a matrix, in the codec, and 4 bytes.

    Options: rank 128, update_gap 200, scale 0.25 (the authors' alpha), eps 1e-6, betas (0.9, 0.999), `projection`,
    `rotate`, `basis`, `lazy_overlap`: as in GaLore. `authors_residual=True` subtracts only `scale` times the
    projection, as the authors' code does, so that with scale < 1 a part of the projection is counted twice; the paper,
    and our default, subtract all.

    Recommended: for pre-training the authors' lr 0.01 with scale 0.25 and rank a quarter of the hidden size. For
    fine-tuning the authors take lr 1e-4 with scale 1. Not for you when gradients are accumulated in backward and
    their sum must be exact (the residual needs the whole gradient; take `galore`), or when the basis is too much:
    `apollo` stores none.
    """

    name = "fira"
    STATES = {**LowRankOptimizer.STATES, "prev_norm": PREVIOUS_NORM, OVERLAP: SHARED}
    DEFAULTS: ClassVar[dict[str, Any]] = {**GaLore.DEFAULTS, "authors_residual": False}
    CHECKS = {**GaLore.CHECKS, "authors_residual": check_flag}
    STRUCTURAL = GaLore.STRUCTURAL

    def full_update(
        self,
        grad: Tensor,
        projected: Tensor,
        direction: Tensor,
        projector: Projector,
        slot: Slot,
        group: Group,
    ) -> Tensor:
        removed = group["scale"] if group["authors_residual"] else 1.0
        prev_norm = slot.load("prev_norm")
        return fira_update(grad, projected, direction, projector, prev_norm, scale=group["scale"], removed=removed)
