"""SimPO: the paper's formula, TRL's own function, the margin."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hf_lowmem.preference.losses import simpo
from tests.preference.losses.test_asft import pairs, random_means

SETTINGS = pytest.mark.parametrize(("beta", "gamma"), [(2.0, 0.5), (2.5, 1.4), (10.0, 3.0), (0.5, 0.0)])


@SETTINGS
def test_it_is_the_paper_s_formula(beta: float, gamma: float):
    """Equation 6 of arXiv 2405.14734: -log σ(β/|y_w| S_w - β/|y_l| S_l - γ), the sigmoid written out."""
    chosen, rejected = (means.clamp(min=-20) for means in random_means(0))
    margin = beta * chosen - beta * rejected - gamma
    want = -torch.log(1 / (1 + torch.exp(-margin)))
    loss, _ = simpo(pairs(chosen, rejected, chosen_len=7, rejected_len=3), beta=beta, simpo_gamma=gamma)
    # exp and log of numbers up to e^203: the written-out form loses log(1 + e^-m) for m > 36, at most 2e-16; margins of
    # 203 are off by a few of their roundings of 1.4e-14 each.
    torch.testing.assert_close(loss, want, rtol=0, atol=2e-13)


@pytest.mark.filterwarnings("ignore")
@SETTINGS
def test_trl_agrees(beta: float, gamma: float):
    """TRL's experimental CPO with loss_type='simpo', in value, gradient and rewards."""
    trl_cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    g = torch.Generator().manual_seed(0)
    leaves = [(-3 * torch.rand(512, generator=g, dtype=torch.float64)).requires_grad_() for _ in range(2)]
    stand_in = SimpleNamespace(
        loss_type="simpo", beta=beta, simpo_gamma=gamma, alpha=0.0, label_smoothing=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    want, chosen_rewards, rejected_rewards = trl_cpo.CPOTrainer.cpo_loss(stand_in, *leaves)
    got, metrics = simpo(pairs(leaves[0], leaves[1]), beta=beta, simpo_gamma=gamma)
    # Both in fp64, of numbers up to β·3 + γ = 33: a spacing of 7.1e-15, met by a few roundings.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    slopes = [torch.autograd.grad(loss.sum(), leaves) for loss in (got, want)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=0, atol=1e-12)
    assert torch.equal(metrics["rewards/chosen"], chosen_rewards)
    assert torch.equal(metrics["rewards/rejected"], rejected_rewards)


def test_at_the_margin_the_loss_is_log_two():
    chosen = torch.tensor([-1.0], dtype=torch.float64)
    assert simpo(pairs(chosen, chosen - 0.25))[0].item() == math.log(2)  # β·0.25 = γ, by default


def test_it_has_no_supervised_term():
    """Both answers less likely by the same factor a token: the same loss."""
    chosen: Tensor = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    loss, metrics = simpo(pairs(chosen, chosen - 0.5))
    assert torch.equal(loss, simpo(pairs(chosen - 8, chosen - 8.5))[0])
    assert "loss/sft" not in metrics
    assert torch.equal(metrics["loss/align"], loss)
