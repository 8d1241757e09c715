"""Aligned Supervised Fine-Tuning: preference training in one stage, without a reference model.

DPO asks how much more likely the chosen answer became *than a frozen copy of the model* finds it, so it keeps
or queries that copy. ASFT asks for absolute odds: p = e^ℓ is the geometric mean of the token probabilities of
an answer, a number in (0, 1), and log p/(1-p) is pushed up for the chosen answer and down for the rejected
one, each alone. An SFT term on the chosen answer stands where DPO's reference stands: it keeps the model
speaking. What is saved is the whole reference model and its forward pass.

Why not ORPO, which also has no reference: ORPO is this loss plus λ·log(p_w(1-p_l) + p_l(1-p_w)), which
couples the two answers. The identity is a test, so ORPO's published behaviour can be compared with ours term
by term.

Another method goes by the same four letters, "Anchored" Supervised Fine-Tuning (arXiv 2509.23753): SFT on
single answers with a KL anchor. It is not this one.
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
def asft(
    policy: PairLogps,
    reference: PairLogps | None = None,
    *,
    beta: float = 1.0,
    asft_lambda: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of Aligned Supervised Fine-Tuning through Absolute Likelihood, one value a pair.

    ```python
    l_w, l_l = policy.chosen / policy.chosen_len, policy.rejected / policy.rejected_len    # nats a token
    r_w, r_l = l_w - log(1 - exp(l_w)), l_l - log(1 - exp(l_l))                             # log-odds
    loss = -l_w - asft_lambda * (logsigmoid(beta * r_w) + logsigmoid(-beta * r_l))
    ```

    Source: arXiv 2409.10571; the formula as restated in arXiv 2502.01237. At beta = 1 it is
    -(1 + λ)·l_w - λ·log(1 - p_l), likelihood on the chosen answer and unlikelihood on the rejected one.

    Args:
        policy: the model's log-probs, (B,) each. Computed in fp32; fp64 is kept.
        reference: must be None. It is here because every preference loss is called the same way.
        beta: steepness of the two sigmoids, > 0.
        asft_lambda: weight of the two preference terms beside the SFT term, >= 0. With 0 it is plain SFT.

    Returns:
        loss: (B,), fp32 or fp64, nats a token. The caller takes the mean.
        metrics: see `pair_metrics`. "rewards/*" are β·r.

    Raises:
        TypeError, ValueError: a reference was given; beta is no finite number > 0; asft_lambda none >= 0.

    Settings: after an SFT stage beta ≈ 0.1 and a learning rate of 3e-7 to 1e-6; from a base model a learning
    rate of 6e-6 to 1e-5. Keep gradient clipping on: the slope in l_l is λβσ(βr_l)/(1 - p_l), λp_l/(1 - p_l)
    at beta = 1, and grows without bound as a rejected answer becomes certain. With beta < 1 so does the
    chosen one's, λβσ(-βr_w)/(1 - p_w). Both are stopped by ℓ <= -1e-6 inside r (`log_odds`), hence at λβ·1e6
    a pair; beyond that limit r gives no gradient. The SFT term is not limited. Sums in fp16 are read
    correctly, but their gradient comes back in fp16 and may overflow there; `pair_logps` gives fp32 sums,
    which cannot.

    When not to use it: rejected answers that are good text, merely a little worse (unlikelihood unlearns what
    the two share); very short answers of one or two tokens, where p comes near 1; a policy that must stay
    close to a given model, since nothing here measures that distance (use DPO).
    """
    refuse_reference("asft", reference)
    check_option("beta", beta, "it scales the log-odds in two sigmoids", positive=True)
    check_option("asft_lambda", asft_lambda, "it weighs the preference terms")
    chosen_mean, rejected_mean = policy.chosen_mean, policy.rejected_mean
    chosen_rewards = beta * log_odds(chosen_mean)
    rejected_rewards = beta * log_odds(rejected_mean)

    sft = -chosen_mean
    align = -asft_lambda * (F.logsigmoid(chosen_rewards) + F.logsigmoid(-rejected_rewards))
    return sft + align, pair_metrics(policy, chosen_rewards, rejected_rewards, sft=sft, align=align)
