"""Simple Preference Optimization: DPO's comparison with the policy's own mean log-probability as the reward.

DPO's reward is a sum of log-ratios to a reference model; what generation maximises is nearer to the mean
log-probability of the policy alone. SimPO takes that mean as the reward, so no reference model exists and long answers
are not favoured, and asks the chosen answer to win by a margin γ.

Why not with an SFT term: the paper has none, and its results are without one. Nothing then keeps log-probabilities
from falling together, so the learning rate must be small; watch `logps_mean/chosen`, or mix TRL's `sft` in by
`loss_type=["simpo", "sft"]`.
"""

import torch.nn.functional as F
from torch import Tensor

from hf_lowmem.preference.losses.logps import PairLogps, check_option, pair_metrics, preference_loss, refuse_reference


@preference_loss(needs_reference=False)
def simpo(
    policy: PairLogps, reference: PairLogps | None = None, *, beta: float = 2.0, simpo_gamma: float = 0.5
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of SimPO, one value a pair.

    ```python
    l_w, l_l = policy.chosen / policy.chosen_len, policy.rejected / policy.rejected_len    # nats a token
    loss = -logsigmoid(beta * (l_w - l_l) - simpo_gamma)
    ```

    Source: arXiv 2405.14734, equation 6. `simpo_gamma` is the paper's γ, a margin in units of the reward β·ℓ. The
    authors' scripts take the ratio γ/β instead; multiply it by beta.

    Args:
        policy: the model's log-probs, (B,) each. Computed in fp32; fp64 is kept.
        reference: must be None.
        beta: scale of the reward, > 0. The paper searches 2.0 to 2.5, and 10 for instruction-tuned Llama 3.
        simpo_gamma: target margin γ, >= 0. The paper searches 0.3 to 1.6; 0.5 at beta 2 is the ratio of 0.25 that its
            scripts and TRL have as their default.

    Returns:
        loss: (B,), fp32 or fp64. The caller takes the mean.
        metrics: see `pair_metrics`. "rewards/*" are β·ℓ; there is no "loss/sft".

    Raises:
        TypeError, ValueError: a reference was given; an option is no finite number in its range.

    Settings: after an SFT stage, one epoch, a batch of 128 pairs and a learning rate of 3e-7 to 1e-6. Above that the
    paper reports incoherent text.

    When not to use it: from a base model (it teaches no answers, use ORPO or ASFT); where rejected answers share long
    correct passages with the chosen ones.
    """
    refuse_reference("simpo", reference)
    check_option("beta", beta, "it scales the reward", positive=True)
    check_option("simpo_gamma", simpo_gamma, "it is the margin by which the chosen answer should win")
    chosen, rejected = policy.chosen_mean, policy.rejected_mean
    align = -F.logsigmoid(beta * (chosen - rejected) - simpo_gamma)
    return align, pair_metrics(policy, beta * chosen, beta * rejected, align=align)
