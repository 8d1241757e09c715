"""ASFT: its two identities, its slopes, its edges, and its digits."""

import math
from itertools import product
from types import SimpleNamespace
from typing import Any

import mpmath
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_lowmem.preference.losses import PairLogps, asft, pair_logps

EPS32, TINY32 = torch.finfo(torch.float32).eps, torch.finfo(torch.float32).tiny
SETTINGS = [(1.0, 1.0), (0.1, 1.0), (2.5, 0.3), (0.5, 0.0)]


def pairs(chosen: Tensor, rejected: Tensor, chosen_len: int = 1, rejected_len: int = 1) -> PairLogps:
    """Pairs whose means are `chosen` and `rejected`."""
    lengths = [torch.full(chosen.shape, n, device=chosen.device) for n in (chosen_len, rejected_len)]
    return PairLogps(chosen * chosen_len, rejected * rejected_len, *lengths)


def random_means(seed: int, count: int = 4096) -> tuple[Tensor, Tensor]:
    """Two (count,) tensors of ℓ in fp64, from -1e-5 to -30 nats a token, evenly in log ℓ."""
    u = torch.rand(2, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    chosen, rejected = -torch.exp(math.log(1e-5) + u * math.log(30 / 1e-5))
    return chosen, rejected


@pytest.mark.parametrize("asft_lambda", [0.0, 0.25, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(4))
def test_at_beta_one_it_is_likelihood_and_unlikelihood(seed: int, asft_lambda: float):
    chosen, rejected = random_means(seed)
    loss, _ = asft(pairs(chosen, rejected), beta=1.0, asft_lambda=asft_lambda)
    log_one_minus_p = torch.log(-torch.expm1(rejected))
    want = -(1 + asft_lambda) * chosen - asft_lambda * log_one_minus_p
    # Values up to 4·30, where one rounding is at most 7.1e-15; about ten of them add up on either side.
    torch.testing.assert_close(loss, want, rtol=0, atol=1e-12)


def orpo(chosen: Tensor, rejected: Tensor, weight: float) -> Tensor:
    """ORPO from its definition (arXiv 2403.07691, eqs. 4 to 7), in the plainest form."""

    def odds(logp: Tensor) -> Tensor:
        return logp.exp() / -torch.expm1(logp)

    log_odds_ratio = torch.log(odds(chosen) / odds(rejected))
    return -chosen - weight * F.logsigmoid(log_odds_ratio)


def orpo_from_asft(chosen: Tensor, rejected: Tensor, weight: float) -> Tensor:
    loss, _ = asft(pairs(chosen, rejected), beta=1.0, asft_lambda=weight)
    p_w, p_l = chosen.double().exp(), rejected.double().exp()
    q_w, q_l = -torch.expm1(chosen.double()), -torch.expm1(rejected.double())
    return loss + weight * torch.log(p_w * q_l + p_l * q_w)


@pytest.mark.parametrize("weight", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(4))
def test_orpo_is_asft_and_one_coupling_term(seed: int, weight: float):
    chosen, rejected = random_means(seed)
    torch.testing.assert_close(
        orpo_from_asft(chosen, rejected, weight), orpo(chosen, rejected, weight), rtol=0, atol=1e-12
    )


@pytest.mark.filterwarnings("ignore")
def test_trl_agrees_about_orpo():
    """TRL's own odds-ratio function, an implementation by other people, through the identity."""
    trl_orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    chosen, rejected = (-3 * torch.rand(2, 512, generator=torch.Generator().manual_seed(0)) - 0.05).unbind()
    stand_in = SimpleNamespace(beta=0.7, accelerator=SimpleNamespace(device="cpu"))
    weighted_ratio, *_ = trl_orpo.ORPOTrainer.odds_ratio_loss(stand_in, chosen, rejected)
    want = -chosen.double() - weighted_ratio.double()
    # TRL computes in fp32: log-odds of at most 3.1, four roundings each of at most 2.4e-7 / 2.
    got = orpo_from_asft(chosen.double(), rejected.double(), 0.7)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("beta", "asft_lambda"), SETTINGS)
def test_gradcheck(beta: float, asft_lambda: float):
    g = torch.Generator().manual_seed(1)
    sums = [(-20 * torch.rand(6, generator=g, dtype=torch.float64) - 0.5).requires_grad_() for _ in range(2)]
    lengths = torch.tensor([1, 2, 3, 5, 8, 13])

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        policy = PairLogps(chosen, rejected, lengths, lengths.flip(0))
        return asft(policy, beta=beta, asft_lambda=asft_lambda)[0]

    assert torch.autograd.gradcheck(loss, sums)
    assert torch.autograd.gradgradcheck(loss, sums)


@pytest.mark.parametrize("asft_lambda", [0.5, 1.0])
def test_slope_of_the_rejected_at_beta_one(asft_lambda: float):
    chosen, rejected = random_means(7)
    rejected.requires_grad_()
    (slope,) = torch.autograd.grad(asft(pairs(chosen, rejected), asft_lambda=asft_lambda)[0].sum(), rejected)
    want = asft_lambda / torch.expm1(-rejected.detach())  # λ p/(1-p)
    torch.testing.assert_close(slope, want, rtol=1e-12, atol=0)


def test_gradient_reaches_every_token_equally():
    per_token = -torch.rand(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.01
    mask = torch.tensor([[0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0], [0, 1, 1, 0, 0, 0]])
    leaf = per_token.requires_grad_()
    asft(pair_logps(leaf, mask), beta=1.0)[0].sum().backward()
    assert leaf.grad is not None
    for row, count in enumerate(mask.sum(1).tolist()):
        mean = per_token[row][mask[row] == 1].mean().item()
        slope = -2.0 if row < 2 else 1 / math.expm1(-mean)
        want = slope / count * mask[row].double()
        torch.testing.assert_close(leaf.grad[row], want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("beta", "asft_lambda"), SETTINGS)
def test_finite_at_the_edges(dtype: torch.dtype, beta: float, asft_lambda: float):
    """Loss and gradient at log-probabilities of exactly 0 and of -1e4, as sums and as means."""
    edges = (0.0, -1e-7, -1e-3, -1.0, -1e4)
    for length in (1, 5, 4096):
        grid = torch.tensor(list(product(edges, edges)))
        chosen, rejected = (column.to(dtype).requires_grad_() for column in grid.unbind(1))
        policy = PairLogps(chosen, rejected, *[torch.full((len(grid),), length)] * 2)
        loss, metrics = asft(policy, beta=beta, asft_lambda=asft_lambda)
        loss.sum().backward()
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert loss.isfinite().all()
        assert chosen.grad is not None
        assert rejected.grad is not None
        assert chosen.grad.isfinite().all()
        assert rejected.grad.isfinite().all()
        assert all(value.isfinite().all() for value in metrics.values())
        # The worst pair is finite because of the limit on ℓ, not because the loss forgot about it.
        certain = (grid[:, 1] == 0) & (grid[:, 0] == -1.0)
        surprised = (grid[:, 1] == -1e4) & (grid[:, 0] == -1.0)
        assert (loss[certain] >= loss[surprised]).all()


def test_a_certain_pair_has_the_documented_value():
    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    other = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    loss, _ = asft(pairs(zero, other))
    loss.sum().backward()
    # r is that of p = e^-1e-6 on both sides: -log p_w = 1e-6, -log(1 - p_l) = 13.8.
    assert loss.item() == pytest.approx(1e-6 - math.log(-math.expm1(-1e-6)), rel=1e-12)
    assert zero.grad == -1  # the SFT term is not held at the limit
    assert other.grad == 0  # beyond the limit, nothing


@pytest.mark.parametrize(("beta", "asft_lambda"), SETTINGS)
def test_the_slope_is_bounded_as_documented(beta: float, asft_lambda: float):
    """At most λβ·1e6 from r on either side, 1 from the SFT term."""
    means = -torch.logspace(-9, 0, 2001, dtype=torch.float64)
    chosen, rejected = means.clone().requires_grad_(), means.clone().requires_grad_()
    asft(pairs(chosen, rejected), beta=beta, asft_lambda=asft_lambda)[0].sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    limit = asft_lambda * beta / -math.expm1(-1e-6)
    assert rejected.grad.abs().max() <= limit
    assert (chosen.grad + 1).abs().max() <= limit


def exactly(l_w: float, l_l: float, beta: float, asft_lambda: float) -> tuple[Any, Any, Any]:
    """The formula as it is printed, and its two slopes, in 60 digits."""

    def sigmoid(x: Any) -> Any:
        return 1 / (1 + mpmath.exp(-x))

    with mpmath.workdps(60):
        p_w, p_l = mpmath.exp(l_w), mpmath.exp(l_l)
        r_w, r_l = l_w - mpmath.log(1 - p_w), l_l - mpmath.log(1 - p_l)
        loss = -l_w - asft_lambda * (mpmath.log(sigmoid(beta * r_w)) + mpmath.log(sigmoid(-beta * r_l)))
        slope_w = -1 - asft_lambda * beta * sigmoid(-beta * r_w) / (1 - p_w)
        slope_l = asft_lambda * beta * sigmoid(beta * r_l) / (1 - p_l)
        return loss, slope_w, slope_l


@pytest.mark.parametrize(("beta", "asft_lambda"), SETTINGS)
def test_fp32_against_sixty_digits(beta: float, asft_lambda: float):
    chosen, rejected = (means.float().clamp(max=-2e-6).requires_grad_() for means in random_means(3, 400))
    loss, metrics = asft(pairs(chosen, rejected), beta=beta, asft_lambda=asft_lambda)
    loss.sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    columns = (chosen, rejected, loss, chosen.grad, rejected.grad)
    rewards = (metrics["rewards/chosen"], metrics["rewards/rejected"])
    for row in zip(*[c.tolist() for c in columns + rewards], strict=True):
        l_w, l_l, got, got_slope_w, got_slope_l, reward_w, reward_l = row
        want, slope_w, slope_l = exactly(l_w, l_l, beta, asft_lambda)
        # In units of eps. log1mexp errs by at most 2 + 6·|log1mexp| (see test_logps.py), and |log1mexp|
        # is at most |ℓ| + |r|. r, β and β·r round by half of |βr| each. log σ passes all that on with a slope
        # below 1, and adds 3 (2 ulp of an exp and of a log1p below ln 2) and its last rounding.
        of_w = beta * (2 + 6 * abs(l_w)) + 7.5 * abs(reward_w)
        of_l = beta * (2 + 6 * abs(l_l)) + 7.5 * abs(reward_l)
        of_sigmoids = of_w + of_l + 6 + 2 * (abs(reward_w) + abs(reward_l))
        assert abs(got - want) <= EPS32 * (asft_lambda * of_sigmoids + abs(l_w) + abs(want)), row
        # The slopes are products: the relative error of σ(x) is the absolute one of x, plus 4 for the exp and
        # the quotient in it, 7 for the slope of log1mexp, and 5 roundings of products and sums. Below x = -87
        # fp32 has only subnormal numbers: `tiny`.
        assert abs(got_slope_w - slope_w) <= EPS32 * (of_w + 16) * abs(slope_w) + TINY32, row
        assert abs(got_slope_l - slope_l) <= EPS32 * (of_l + 16) * abs(slope_l) + TINY32, row


def test_no_weight_is_sft_on_the_chosen():
    chosen, rejected = random_means(5)
    rejected.requires_grad_()
    loss, metrics = asft(pairs(chosen, rejected), asft_lambda=0.0)
    assert torch.equal(loss, -chosen)
    assert torch.equal(metrics["loss/sft"], -chosen)
    assert metrics["loss/align"].count_nonzero() == 0
    (slope,) = torch.autograd.grad(loss.sum(), rejected)
    assert slope.count_nonzero() == 0


def test_only_the_mean_counts():
    """Ten times the tokens and ten times the sum: the same loss, up to two roundings of ℓ."""
    chosen, rejected = random_means(6)
    short, _ = asft(pairs(chosen, rejected, 1, 1), beta=0.1)
    long, _ = asft(pairs(chosen, rejected, 10, 7), beta=0.1)
    # ℓ moves by two half ulps, and |ℓ·dL/dℓ| is at most |ℓ| + λβ·|ℓ|/(1 - p) <= 2·|ℓ| + 1 for each side.
    eps = torch.finfo(torch.float64).eps
    bound = eps * (2 * (chosen.abs() + rejected.abs()) + 2) + 8 * eps * (short.abs() + 1)
    assert ((short - long).abs() <= bound).all()


def test_metrics():
    chosen, rejected = torch.tensor([-0.5, -2.0, -1.0]), torch.tensor([-1.5, -0.25, -1.0])
    leaf = chosen.clone().requires_grad_()
    policy = pairs(leaf, rejected, 4, 2)
    loss, metrics = asft(policy, beta=0.5, asft_lambda=2.0)
    assert set(metrics) == {
        *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
        *("logps/chosen", "logps/rejected", "logps_mean/chosen", "logps_mean/rejected"),
        *("loss/sft", "loss/align"),
    }
    assert metrics["rewards/accuracies"].tolist() == [1, 0, 0]
    for side, means in (("chosen", chosen), ("rejected", rejected)):
        r = [0.5 * math.log(math.exp(x) / (1 - math.exp(x))) for x in means.tolist()]
        assert metrics[f"rewards/{side}"].tolist() == pytest.approx(r, abs=8 * EPS32)
    assert torch.equal(metrics["rewards/margins"], metrics["rewards/chosen"] - metrics["rewards/rejected"])
    assert metrics["logps/chosen"].tolist() == [-2, -8, -4]
    assert metrics["logps/rejected"].tolist() == [-3, -0.5, -2]
    assert torch.equal(metrics["logps_mean/chosen"], chosen)
    assert torch.equal(metrics["logps_mean/rejected"], rejected)
    assert torch.equal(metrics["loss/sft"] + metrics["loss/align"], loss.detach())


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan, math.inf])
def test_bad_beta(beta: float):
    with pytest.raises(ValueError, match=rf"beta={beta!r}: .* finite and > 0"):
        asft(pairs(torch.tensor([-1.0]), torch.tensor([-1.0])), beta=beta)


@pytest.mark.parametrize("asft_lambda", [-1.0, math.nan, math.inf])
def test_bad_lambda(asft_lambda: float):
    with pytest.raises(ValueError, match=rf"asft_lambda={asft_lambda!r}: .* finite and >= 0"):
        asft(pairs(torch.tensor([-1.0]), torch.tensor([-1.0])), asft_lambda=asft_lambda)
