"""GaLore: Adam in the leading singular directions of the gradient.

The gradients of a weight matrix stay close to a slowly moving subspace. Adam's moments are kept for the coordinates in
that subspace alone, and its direction is projected back, so the weight itself may still move anywhere over time: unlike
LoRA, nothing confines the sum of the steps to a small rank.
"""

from typing import Any, ClassVar

from torch import Tensor

from hf_lowmem.codecs import CODECS
from hf_lowmem.optim.lowrank.family import SHARED, SUM, LowRankOptimizer
from hf_lowmem.optim.lowrank.projector import Projector
from hf_lowmem.optim.slot import Slot
from hf_lowmem.optim.state import OVERLAP, WINDOW, Group
from hf_lowmem.specs import check_choice, check_number


def check_overlap(label: str, value: object) -> None:
    """Raise unless `value` is None or a number between 0 and 1."""
    if value is not None:
        check_number(label, value, low=0.0, low_open=True, high=1.0)


def check_basis(label: str, value: object) -> None:
    """Raise unless `value` is None or the name of a codec."""
    if value is not None:
        check_choice(label, value, CODECS)


class GaLore(LowRankOptimizer):
    """GaLore (arXiv 2403.03507, algorithm 2).

    ```python
    # grad (m, n), m >= n; P (n, r), orthonormal, new at each t % update_gap == 0 (t from 0). m < n: from the left
    R = grad @ P                                             # (m, r)
    m = beta1 * m + (1 - beta1) * R
    v = beta2 * v + (1 - beta2) * R**2
    N = m / (sqrt(v) + eps)
    p -= lr * sqrt(1 - beta2**(t+1)) / (1 - beta1**(t+1)) * scale * N @ P.T
    p -= lr * weight_decay * p
    ```

    Applies to matrices and batches of matrices (fused experts) whose smaller side exceeds `rank`. `make_optimizer`
    gives it those of linear layers; embeddings, the output head, norms and biases take Adam with the same codec and the
    family's order of eps and decay.

    State: 2 * r * max(m, n) + r * min(m, n) values a matrix, in the codec (with `projection="random"` without the
    second term). Parameters of fewer than 4096 values keep fp32 states.

    Options: rank 128, update_gap 200, scale 0.25, eps 1e-6, betas (0.9, 0.999) are the authors'; "subspace" stands for
    their SVD, which is `projection="svd"`. `rotate=True` turns the moments into each new basis, which the paper does
    not do; see `rotate_first` and `rotate_second`. `basis` names a codec for the basis alone, None the one of the
    moments: with "int4" (the idea of Q-GaLore, arXiv 2407.08296) it takes 0.53 bytes a value. Its values then err by a
    tenth and it is nearly orthonormal, with singular values between 0.9 and 1.1; a gradient is projected, and a
    direction projected back, by the same decoded basis. `lazy_overlap`, a number between 0 and 1, refreshes
    a weight's basis (not that of fused experts) the less often the less it moves: a refresh that has kept at least that
    share of the subspace doubles the interval, up to eight update_gaps, and any other brings it back to one. Take 0.9:
    with "subspace" a gradient of mere noise keeps m / (m + n), as one power step starts from the last basis.

    Recommended: for pre-training the authors' lr 0.01 with scale 0.25 and rank a quarter of the hidden size (7B: rank
    1024, lr 0.005, update_gap 500). For fine-tuning lr * scale about AdamW's learning rate; the authors take lr 3e-5
    with scale 4, rank 4 and update_gap 500 on RoBERTa. Not for you when rank reaches the smaller side of your weights
    (nothing is saved; take `adamw` with `state="8bit"`), or when a run is shorter than some update_gaps: it sees a few
    subspaces only, and `fira`, which also steps in the rest, or `apollo` serve better.
    """

    name = "galore"
    STATES = {**LowRankOptimizer.STATES, WINDOW: SUM, OVERLAP: SHARED}
    DEFAULTS: ClassVar[dict[str, Any]] = {
        "betas": (0.9, 0.999),
        "eps": 1e-6,
        "rank": 128,
        "update_gap": 200,
        "scale": 0.25,
        "projection": "subspace",
        "embeddings": "adam",
        "cautious": False,
        "rotate": False,
        "basis": None,
        "lazy_overlap": None,
    }
    CHECKS = {**LowRankOptimizer.CHECKS, "basis": check_basis, "lazy_overlap": check_overlap}
    STRUCTURAL = (*LowRankOptimizer.STRUCTURAL, "basis", "lazy_overlap")
    ACCUMULATES = True

    def full_update(
        self,
        grad: Tensor,
        projected: Tensor,
        direction: Tensor,
        projector: Projector,
        slot: Slot,
        group: Group,
    ) -> Tensor:
        return projector.project_back(direction).mul_(group["scale"])
