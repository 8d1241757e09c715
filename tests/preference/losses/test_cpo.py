"""CPO: the paper's formula, DPO against a uniform reference, TRL's own function."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_lowmem.preference.losses import PairLogps, cpo

SETTINGS = pytest.mark.parametrize(("beta", "alpha"), [(0.1, 1.0), (0.5, 0.25), (1.0, 0.0)])


def some(seed: int) -> PairLogps:
    g = torch.Generator().manual_seed(seed)
    sums = [(-30 * torch.rand(512, generator=g, dtype=torch.float64) - 0.1).requires_grad_() for _ in range(2)]
    return PairLogps(*sums, *(torch.randint(1, 40, (512,), generator=g) for _ in range(2)))


@SETTINGS
def test_it_is_the_paper_s_formula(beta: float, alpha: float):
    """Equations 3 to 5 of arXiv 2401.08417, the likelihood as the mean over the answer, as its authors compute it."""
    policy = some(0)
    want = -torch.log(torch.sigmoid(beta * policy.chosen - beta * policy.rejected))
    want = want - alpha * policy.chosen / policy.chosen_len
    torch.testing.assert_close(cpo(policy, beta=beta, cpo_alpha=alpha)[0], want, rtol=0, atol=1e-12)


def test_it_is_dpo_against_a_uniform_reference():
    """A reference that gives every answer the same log-probability, here -7, cancels."""
    policy, reference = some(1), -7.0
    ratios = [sums - reference for sums in (policy.chosen, policy.rejected)]
    want = -F.logsigmoid(0.3 * (ratios[0] - ratios[1]))
    torch.testing.assert_close(cpo(policy, beta=0.3, cpo_alpha=0.0)[0], want, rtol=0, atol=1e-13)


@pytest.mark.filterwarnings("ignore")
@SETTINGS
def test_trl_agrees(beta: float, alpha: float):
    trl_cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    policy = some(2)
    stand_in = SimpleNamespace(
        loss_type="sigmoid", beta=beta, alpha=0.0, label_smoothing=0.0, accelerator=SimpleNamespace(device="cpu")
    )
    want, chosen_rewards, rejected_rewards = trl_cpo.CPOTrainer.cpo_loss(stand_in, policy.chosen, policy.rejected)
    want = want - alpha * policy.chosen / policy.chosen_len
    got, metrics = cpo(policy, beta=beta, cpo_alpha=alpha)
    # Both in fp64, of numbers up to 60: a spacing of 7.1e-15, met by a few roundings.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    leaves = (policy.chosen, policy.rejected)
    slopes: list[tuple[Tensor, ...]] = [torch.autograd.grad(loss.sum(), leaves) for loss in (got, want)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=0, atol=1e-12)
    assert torch.equal(metrics["rewards/chosen"], chosen_rewards)
    assert torch.equal(metrics["rewards/rejected"], rejected_rewards)


def test_the_comparison_is_of_sums_and_the_cloning_of_means():
    policy = some(3)
    longer = PairLogps(policy.chosen, policy.rejected, policy.chosen_len * 2, policy.rejected_len * 3)
    (_, short), (_, long) = cpo(policy), cpo(longer)
    assert torch.equal(short["loss/align"], long["loss/align"])
    assert torch.equal(short["loss/sft"], 2 * long["loss/sft"])
