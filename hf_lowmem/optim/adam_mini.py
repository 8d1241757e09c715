"""Adam-mini: Adam with one second moment for each row, where Adam has one for each value.

A weight matrix's Hessian is nearly made of dense blocks along its diagonal: an output's weights, an attention head's
queries or keys, a token's embedding. Within such a block one good learning rate does as well as many, so the second
moment is kept for the block, and half of Adam's state is gone.

Each row keeps its number, and the rows of one head keep the same one. That costs 4 bytes a row beside a byte or more a
value, and makes of all states something that has rows, so that FSDP2 cuts it as it cuts the weights.
"""

from typing import ClassVar

from torch import Tensor

from hf_lowmem.optim.base import LowMemOptimizer
from hf_lowmem.optim.rows import mini_, square_rows, square_shape
from hf_lowmem.optim.slot import Slot
from hf_lowmem.optim.state import Group, Reach, Shape, StateDecl


class AdamMini(LowMemOptimizer):
    """Adam-mini (arXiv 2406.16793, algorithms 1 and 3) whose momentum is stored by a codec.

    ```python
    # p, grad and m (out, in); v (out,), fp32. b: the rows of a block, one row but for queries and keys
    v   = beta2 * v + (1 - beta2) * mean(grad**2, dim=b)
    m   = beta1 * m + (1 - beta1) * grad                     # stored signed
    p  *= 1 - lr * weight_decay
    p  -= lr * m / (1 - beta1**t) / (sqrt(v / (1 - beta2**t)) + eps)[:, None]
    ```

    Blocks: an output's row of linear weights (a column of GPT-2's Conv1D), of each fused expert and of a convolution; a
    token's row of embedding and head; a head's rows of a projection to queries or keys, if its module has a `head_dim`;
    a norm as a whole; each value of a bias. Queries and keys that are fused with values into one weight have a block a
    row, which is finer than the paper's. That is the partition of the authors' package 1.1.1, except that it takes a
    head to have dim / n_heads rows and finds roles by parts of names.

    Defaults: betas (0.9, 0.999), eps 1e-8. `head`, `bias`, `experts` and `outputs` of a group say what its parameters
    are; `make_optimizer` finds them. Of bare parameters every matrix has a block a row.

    State, bytes a parameter: fp32 4, bf16 2, 8bit and int8_softsign 1.03, int8 1.02, int4 0.53; and 4 a row.

    Recommended: AdamW's learning rate, betas and weight decay as they are, for pre-training and for fine-tuning, with
    `state="8bit"`. Not for you where a byte a parameter is too much (take `apollo_mini`), nor for weights that are no
    layers of a network: one number a row is right for rows whose values are alike.
    """

    name = "adam_mini"
    STATES = {
        "exp_avg": StateDecl(signed=True),
        "row_sq": StateDecl(signed=False, shape=square_shape, coded=False, rows=square_rows),
    }
    DEFAULTS: ClassVar[Group] = {"betas": (0.9, 0.999), "eps": 1e-8}
    FACTS = ("experts", "outputs", "head", "bias")

    @classmethod
    def reach(cls, shape: Shape, group: Group) -> Reach:
        if len(shape) < 2:
            return "row" if group["bias"] else "whole"
        whole = len(shape) == 2 and (group["head"] is not None or group["outputs"] == -1)
        return "whole" if whole else "row"

    def update(self, p: Tensor, grad: Tensor, slot: Slot, group: Group) -> None:
        mini_(p, grad, slot, group)
