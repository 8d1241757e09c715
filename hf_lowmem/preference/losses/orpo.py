"""Odds Ratio Preference Optimization: supervised fine-tuning and preference in one stage, without a reference model.

SFT alone raises the probability of rejected answers too, since they look like the chosen ones. ORPO adds one weak term
that compares the *odds* of the two answers, p/(1-p) with p the geometric mean of the token probabilities, so that the
chosen answer is raised and the rejected one held back in the same step.

Why odds, not probabilities: log σ of a log-probability ratio punishes the rejected answer hardest where it is already
unlikely; the odds ratio is milder there (section 7.1 of the paper). Compared with ASFT (`losses/asft.py`), which pushes
each answer alone, ORPO pushes their difference, and its weight is ten times smaller: it is mostly SFT.
"""

import torch.nn.functional as F
from torch import Tensor

from hf_lowmem.preference.losses.logps import (
    PairLogps,
    check_option,
    log_odds,
    pair_metrics,
    preference_loss,
    refuse_reference,
)


@preference_loss(needs_reference=False)
def orpo(
    policy: PairLogps, reference: PairLogps | None = None, *, orpo_lambda: float = 0.1
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of ORPO, one value a pair.

    ```python
    l_w, l_l = policy.chosen / policy.chosen_len, policy.rejected / policy.rejected_len    # nats a token
    log_odds_ratio = (l_w - log(1 - exp(l_w))) - (l_l - log(1 - exp(l_l)))
    loss = -l_w - orpo_lambda * logsigmoid(log_odds_ratio)
    ```

    Source: arXiv 2403.07691, equations 4 to 7. The paper's λ is `orpo_lambda` here and `beta` in TRL's ORPOConfig. It
    weighs a term and is no temperature, so it does not share the field of DPO's β, with which it may be mixed.

    Args:
        policy: the model's log-probs, (B,) each. Computed in fp32; fp64 is kept.
        reference: must be None.
        orpo_lambda: λ, weight of the odds-ratio term, >= 0. With 0 it is plain SFT.

    Returns:
        loss: (B,), fp32 or fp64, nats a token. The caller takes the mean.
        metrics: see `pair_metrics`. "rewards/*" are λ·ℓ, as in TRL.

    Raises:
        TypeError, ValueError: a reference was given; orpo_lambda is no finite number >= 0.

    Beside TRL's ORPOTrainer: the odds-ratio term is the same to rounding, but ℓ is held at or below -1e-6 inside it,
    where TRL's becomes infinite. The SFT term differs on purpose: TRL takes the mean over all tokens of the batch's
    chosen rows, *prompts included*. Here it is ℓ_w, the answer's own, because equation 6 is the likelihood of the
    answer given the prompt, and because a pair's loss must not depend on the batch that it came in (gradient
    accumulation would then change the loss). The two are equal where there is one pair a batch and no prompt.

    Settings: λ 0.1 to 0.25 and a learning rate of 5e-6 to 8e-6, from a base model (the paper's, for 2.7B to 7B
    parameters).

    When not to use it: after an SFT stage on the same answers, where the SFT term has nothing left to teach (use ASFT
    with a small beta, or DPO); with prompts that should be learnt too.
    """
    refuse_reference("orpo", reference)
    check_option("orpo_lambda", orpo_lambda, "it weighs the odds-ratio term")
    chosen, rejected = policy.chosen_mean, policy.rejected_mean
    sft = -chosen
    align = -orpo_lambda * F.logsigmoid(log_odds(chosen) - log_odds(rejected))
    return sft + align, pair_metrics(policy, orpo_lambda * chosen, orpo_lambda * rejected, sft=sft, align=align)
