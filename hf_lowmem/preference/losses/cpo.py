"""Contrastive Preference Optimization: DPO against a uniform reference, with behaviour cloning in its place.

Take DPO, let the reference give every answer the same probability, and it cancels: the loss is an upper bound of DPO's
for the ideal reference (the paper's theorem 1), at half the memory. What the reference did, keeping the policy near
text that it knows, is done by a likelihood term on the chosen answers.

Why sums of log-probabilities, where ORPO and SimPO take means: so does DPO, and the derivation starts from it. Long
answers weigh more for it; that is the paper's loss, and SimPO is the length-normalised one.
"""

import torch.nn.functional as F
from torch import Tensor

from hf_lowmem.preference.losses.logps import PairLogps, check_option, pair_metrics, preference_loss, refuse_reference


@preference_loss(needs_reference=False)
def cpo(
    policy: PairLogps, reference: PairLogps | None = None, *, beta: float = 0.1, cpo_alpha: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of CPO, one value a pair.

    ```python
    l_w = policy.chosen / policy.chosen_len    # nats a token
    loss = -logsigmoid(beta * (policy.chosen - policy.rejected)) - cpo_alpha * l_w
    ```

    Source: arXiv 2401.08417, equations 3 to 5.

    Args:
        policy: the model's log-probs, (B,) each. Computed in fp32; fp64 is kept.
        reference: must be None.
        beta: temperature of the difference of the two sums, > 0.
        cpo_alpha: weight of the behaviour-cloning term, >= 0. 0 leaves the comparison alone.

    Returns:
        loss: (B,), fp32 or fp64. The caller takes the mean.
        metrics: see `pair_metrics`. "rewards/*" are β·S, as in TRL.

    Raises:
        TypeError, ValueError: a reference was given; an option is no finite number in its range.

    Beside TRL's CPOTrainer: the comparison is the same. The likelihood term of equation 5 is printed as a sum over the
    answer; the authors' code and TRL take the mean over all answer tokens of the batch; here it is the mean over the
    pair's own answer, because a pair's loss must not depend on the batch that it came in. With one pair a batch, or
    answers of one length, it is TRL's. AlphaPO's reward and label smoothing are not part of CPO, and not here.

    Settings: beta 0.1 and cpo_alpha 1 are the paper's; a learning rate of 1e-6, TRL's default, after an SFT stage.

    When not to use it: chosen and rejected answers of very different lengths, where the sum decides by length.
    """
    refuse_reference("cpo", reference)
    check_option("beta", beta, "it scales the difference of the two log-probabilities", positive=True)
    check_option("cpo_alpha", cpo_alpha, "it weighs the behaviour-cloning term")
    chosen, rejected = policy.sums
    align = -F.logsigmoid(beta * (chosen - rejected))
    sft = -cpo_alpha * policy.chosen_mean
    return sft + align, pair_metrics(policy, beta * chosen, beta * rejected, sft=sft, align=align)
