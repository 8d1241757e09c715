"""ORPO: the paper's formula, the identity with ASFT, TRL's own odds-ratio function, and its edges."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from hf_lowmem.preference.losses import asft, orpo
from tests.preference.losses.test_asft import pairs, random_means

WEIGHTS = pytest.mark.parametrize("orpo_lambda", [0.0, 0.1, 1.0, 3.0])


@WEIGHTS
@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_paper_s_formula(seed: int, orpo_lambda: float):
    """Equations 4 to 7 of arXiv 2403.07691, with odds as quotients."""
    chosen, rejected = random_means(seed)
    odds_w, odds_l = (means.exp() / -torch.expm1(means) for means in (chosen, rejected))
    want = -chosen - orpo_lambda * F.logsigmoid(torch.log(odds_w / odds_l))
    loss, _ = orpo(pairs(chosen, rejected), orpo_lambda=orpo_lambda)
    # Values up to 30·(1 + λ) = 120, where one rounding is at most 7.1e-15; about ten of them add up on either side.
    torch.testing.assert_close(loss, want, rtol=0, atol=1e-12)


@WEIGHTS
def test_it_is_asft_and_one_coupling_term(orpo_lambda: float):
    """log σ(a - b) = log σ(a) + log σ(-b) - log(p_w(1 - p_l) + p_l(1 - p_w)) for log-odds a and b."""
    chosen, rejected = random_means(5)
    p_w, p_l = chosen.exp(), rejected.exp()
    coupling = torch.log(p_w * -torch.expm1(rejected) + p_l * -torch.expm1(chosen))
    want = asft(pairs(chosen, rejected), asft_lambda=orpo_lambda)[0] + orpo_lambda * coupling
    torch.testing.assert_close(orpo(pairs(chosen, rejected), orpo_lambda=orpo_lambda)[0], want, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("orpo_lambda", [0.1, 0.7])
def test_trl_agrees(orpo_lambda: float):
    """TRL's odds-ratio function in value, gradient and rewards, on the same mean log-probabilities."""
    trl_orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    leaves = [
        (-3 * torch.rand(512, generator=torch.Generator().manual_seed(s)) - 0.05).requires_grad_() for s in range(2)
    ]
    stand_in = SimpleNamespace(beta=orpo_lambda, accelerator=SimpleNamespace(device="cpu"))
    ratio, chosen_rewards, rejected_rewards, *_ = trl_orpo.ORPOTrainer.odds_ratio_loss(stand_in, *leaves)
    want = -leaves[0] - ratio
    got, metrics = orpo(pairs(leaves[0], leaves[1]), orpo_lambda=orpo_lambda)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    slopes = [torch.autograd.grad(loss.sum(), leaves) for loss in (got, want)]
    # The slope is at most 1 + λ/(1 - p) <= 15.4, p <= e^-0.05, of ten or so fp32 operations: 15.4·10·6e-8 < 1e-5.
    torch.testing.assert_close(slopes[0], slopes[1], rtol=0, atol=1e-5)
    assert torch.equal(metrics["rewards/chosen"], chosen_rewards)
    assert torch.equal(metrics["rewards/rejected"], rejected_rewards)


def test_lambda_zero_is_supervised():
    chosen, rejected = random_means(1)
    loss, metrics = orpo(pairs(chosen, rejected), orpo_lambda=0.0)
    assert torch.equal(loss, -chosen)
    assert not metrics["loss/align"].any()


def test_a_certain_pair_has_the_documented_value():
    """Where TRL's function is infinite less infinite, r is held at that of ℓ = -1e-6."""
    zero = torch.zeros(1, dtype=torch.float64)
    low = torch.full((1,), -1.0, dtype=torch.float64)
    assert orpo(pairs(zero, zero))[0].item() == pytest.approx(0.1 * math.log(2), rel=1e-12)
    surest = orpo(pairs(zero, low), orpo_lambda=1.0)[0].item()
    r = -1e-6 - math.log(-math.expm1(-1e-6)) - (-1.0 - math.log(-math.expm1(-1.0)))
    assert surest == pytest.approx(math.log1p(math.exp(-r)), rel=1e-9)


def test_length_matters_by_the_mean_alone():
    chosen, rejected = torch.tensor([[-0.5, -1.5], [-1.0, -2.0]], dtype=torch.float64)
    short, long = (orpo(pairs(chosen, rejected, chosen_len=n, rejected_len=2 * n))[0] for n in (1, 64))
    assert torch.equal(short, long)
