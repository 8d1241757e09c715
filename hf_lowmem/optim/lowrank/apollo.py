"""APOLLO and APOLLO-Mini: the gradient itself, rescaled as Adam would, from moments of a random projection.

Adam's direction differs from the gradient mostly by one factor per channel. That factor can be read off a random
projection of the gradient to a few dimensions, so the moments live in rank r (Mini: one), no basis is stored, and
nothing of the weight's size is kept.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_lowmem.kernels.apollo import APOLLO_STEP
from hf_lowmem.kernels.apollo.reference import apollo_update, update_by_factors
from hf_lowmem.optim.fused import is_plain, kernel_runs
from hf_lowmem.optim.lowrank.family import PREVIOUS_NORM, LowRankOptimizer
from hf_lowmem.optim.lowrank.pipeline import growth_of_, tensor_scale
from hf_lowmem.optim.lowrank.projector import Projector
from hf_lowmem.optim.lowrank.together import rescale, step_together
from hf_lowmem.optim.slot import KNOWN, Slot
from hf_lowmem.optim.state import WINDOW, Group
from hf_lowmem.weights import Weights


class Apollo(LowRankOptimizer):
    """APOLLO (arXiv 2412.05270, algorithm 1).

    ```python
    # grad (m, n), m >= n; P (n, r) Gaussian with variance 1/r, redrawn after each `update_gap` steps
    R = grad @ P                                             # (m, r)
    m = beta1 * m + (1 - beta1) * R
    v = beta2 * v + (1 - beta2) * R**2
    N = m / (sqrt(v) + eps)
    s = norm(N, dim=1) / (norm(R, dim=1) + 1e-8)             # (m,), one factor a channel
    U = limit_norm_growth(grad * s[:, None]) * sqrt(scale)   # at most 1.01 times the last norm
    p -= lr * sqrt(1 - beta2**t) / (1 - beta1**t) * U
    p -= lr * weight_decay * p
    ```

    Applies to matrices and batches of matrices (fused experts) whose smaller side exceeds `rank`. `make_optimizer`
    gives it those of linear layers; embeddings, the output head, norms and biases take Adam with the same codec and the
    family's order of eps and decay.

    State: 2 * max(m, n) * rank values a matrix, in the codec, and 4 bytes. With `projection="svd"` (the authors' other
    variant) or "subspace" the factors are read in the leading singular directions, whose basis is stored: rank *
    min(m, n) values more.

    Recommended: pre-training rank = a quarter of the hidden size, lr 0.01 with scale 1; fine-tuning rank 256 and lr
    about that of AdamW, where sqrt(scale) wants tuning (the authors use scale 32 for an 8B model). Not for you when
    rank reaches the smaller side of your weights: nothing is saved then, take `adamw` with `state="int8"`.
    """

    name = "apollo"
    STATES = {**LowRankOptimizer.STATES, "prev_norm": PREVIOUS_NORM}
    DEFAULTS: ClassVar[dict[str, Any]] = {
        "betas": (0.9, 0.999),
        "eps": 1e-6,
        "rank": 256,
        "update_gap": 200,
        "scale": 1.0,
        "projection": "random",
        "embeddings": "adam",
        "cautious": False,
    }
    PROJECTS_BACK = False
    per_channel: ClassVar[bool] = True

    def full_update(
        self,
        grad: Tensor,
        projected: Tensor,
        direction: Tensor,
        projector: Projector,
        slot: Slot,
        group: Group,
    ) -> Tensor:
        prev_norm, shards = slot.load("prev_norm"), slot.shards
        if not slot.cut:
            return apollo_update(
                grad, projected, direction, prev_norm, per_channel=self.per_channel, scale=group["scale"]
            )
        # the same, of a matrix that is cut
        if self.per_channel:
            s = projector.channel_scale(direction, projected)
        else:
            s = tensor_scale(direction, projected, shards)
        return update_by_factors(grad, s, growth_of_(grad * s, prev_norm, shards), group["scale"])

    def apply(self, weights: Weights, grad: Tensor, slot: Slot, group: Group) -> None:
        p = weights.p
        if group["cautious"] or not (slot.low_rank and is_plain(p) and kernel_runs(APOLLO_STEP, p)):
            super().apply(weights, grad, slot, group)
            return
        projected, direction, _ = self.adam(grad, slot, group)
        assert p.grad is not None
        finite = weights.finite.to(torch.int32).view(1)
        one = [(p, slot)], [p.grad.contiguous()], projected.contiguous()[None], direction.contiguous()[None]
        counted_elsewhere = torch.zeros((), dtype=torch.int64, device=p.device)
        rescale(*one, finite, counted_elsewhere, group, per_channel=self.per_channel)
        if slot.finite is not None:
            slot.finite.append(finite[0] != 0)

    def steps_together(self, p: Tensor, slot: Slot, group: Group, runs: dict[tuple[object, ...], bool]) -> bool:
        if group["cautious"] or group["projection"] != "random":
            return False
        if slot.sharded or WINDOW in slot.raw or not is_plain(p):
            return False
        if slot.coded and not slot.dithers:  # kernels round every coded state at random
            return False
        assert p.grad is not None
        kind = APOLLO_STEP.name, slot.device, p.dtype, p.grad.dtype, slot.codec_names
        if kind not in runs:
            runs[kind] = KNOWN.issuperset(slot.codec_names) and kernel_runs(APOLLO_STEP, p, slot.codec_names)
        return runs[kind]

    def step_together(
        self, entries: Sequence[tuple[Tensor, Slot]], group: Group, skipped_on: Callable[[torch.device], Tensor]
    ) -> None:
        step_together(entries, group, skipped_on, per_channel=self.per_channel)


class ApolloMini(Apollo):
    """APOLLO-Mini (arXiv 2412.05270, section 4.3): rank 1 and one factor for a whole matrix, s = ||N|| / ||R||.

    State: 2 * max(m, n) values a matrix: with `state="int8"` an 8B model's linear layers keep a few megabytes, and what
    is left is the embedding's and the head's. Defaults: rank 1, scale 128.

    Recommended: the authors' lr 0.01 and scale 128 for pre-training; for fine-tuning tune lr * sqrt(scale), about that
    of AdamW to begin with. Not for you when a little more memory is at hand: `apollo` follows Adam more closely.
    """

    name = "apollo_mini"
    DEFAULTS: ClassVar[dict[str, Any]] = {**Apollo.DEFAULTS, "rank": 1, "scale": 128.0}
    per_channel = False
