"""SCALE and SinkGD: gradients made alike in size, and next to no state.

What Adam's second moment does for a weight matrix is, to a large part, to give each output a step of the same size.
That needs no memory: a row of the gradient is divided by its root mean square. Only the output head, whose gradient is
the noisiest, keeps a momentum. SinkGD divides rows and columns in turns until both are alike (Sinkhorn's iteration).
"""

import functools
from typing import ClassVar

from torch import Tensor

from hf_lowmem.optim.adamw import FUSED_ADAMW, adamw_update
from hf_lowmem.optim.base import LowMemOptimizer
from hf_lowmem.optim.embeddings import other_reach, other_rule, other_states, update_other
from hf_lowmem.optim.rows import inputs_dim, is_matrix, normalized, scale_
from hf_lowmem.optim.slot import Slot
from hf_lowmem.optim.state import Group, Reach, Shape
from hf_lowmem.specs import check_integer


def sinkhorn(grad: Tensor, iterations: int, slot: Slot, group: Group) -> Tensor:
    """A gradient whose rows and columns are divided in turns by their root mean square (arXiv 2502.06742, algorithm 3).

    The paper's rows, which come first, are those of an output; its factors of the roots of m and n make of norms what
    root mean squares are.
    """
    inputs = inputs_dim(group)
    for _ in range(iterations):
        grad = normalized(normalized(grad, inputs, slot), -3 - inputs, slot)
    return grad


class Scale(LowMemOptimizer):
    """SCALE (arXiv 2506.16659, algorithm 1), and SinkGD (arXiv 2502.06742).

    ```python
    # linear, (out, in); a Conv1D's columns and each fused expert's rows alike
    u  = grad / max(sqrt(mean(grad**2, dim=in)), 1e-8)
    # embedding, (tokens, hidden)
    u  = grad / max(sqrt(mean(grad**2, dim=tokens)), 1e-8)
    # output head, (tokens, hidden), and what is tied to it
    m  = beta1 * m + (1 - beta1) * grad                      # stored signed
    u  = m / max(sqrt(mean(m**2, dim=hidden)), 1e-8)
    p *= 1 - lr * weight_decay
    p -= lr * u
    # all else (norms, biases, convolutions): AdamW
    ```

    `sinkhorn_iters=5` is SinkGD: rows and columns of linear weights are divided in turns, so many times. Its authors
    leave embedding and head to Adam, which is `embeddings="adam"`; "adam_mini" is between the two.

    Defaults: betas (0.9, 0.999), eps 1e-8, sinkhorn_iters 0, embeddings "scale". `role`, `experts` and `outputs` of a
    group say which parameters it has; `make_optimizer` finds them. Bare matrices are linear weights.

    State: nothing for linear weights and embedding, one moment for the head: of an 8B model 0.5 GiB in 8 bits.

    Recommended: pre-training with the authors' learning rate, 1e-3 at 60M to 2e-4 at 1B parameters, at batches of 512
    sequences. An update's root mean square is 1, that of AdamW about a fifth to a third: for the same step the
    learning rate is as much smaller. Norms and biases take AdamW at that rate. For fine-tuning there is no published
    evidence. Not for you with small batches, whose noise is normalised to full size (there is no average but the
    head's), nor where most tokens of the vocabulary are absent from a batch: the few that are there share the length
    of a whole column, so their steps are many times longer. Take `apollo_mini`, or `embeddings="adam"`.
    """

    name = "scale"
    STATES = other_states(is_matrix)
    DEFAULTS: ClassVar[Group] = {
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "embeddings": "scale",
        "sinkhorn_iters": 0,
    }
    CHECKS = {"sinkhorn_iters": functools.partial(check_integer, low=0)}
    FACTS = ("role", "experts", "outputs")
    FUSED = FUSED_ADAMW

    @classmethod
    def rule(cls, shape: Shape, group: Group) -> str:
        return cls.name if is_matrix(shape, group) else other_rule(group)

    @classmethod
    def reach(cls, shape: Shape, group: Group) -> Reach:
        if not is_matrix(shape, group):
            return other_reach(group)
        by_rows = group["outputs"] == -2 or len(shape) == 3  # the rows of a batch are its matrices
        return "row" if by_rows and (not group["sinkhorn_iters"] or len(shape) == 3) else "whole"

    def update(self, p: Tensor, grad: Tensor, slot: Slot, group: Group) -> None:
        if is_matrix(slot.shape, group):
            iterations = group["sinkhorn_iters"]
            alike = sinkhorn(grad, iterations, slot, group) if iterations else normalized(grad, inputs_dim(group), slot)
            scale_(p, alike, group)
        elif slot.elementwise:
            adamw_update(p, grad, slot, group)
        else:
            update_other(p, grad, slot, group)
