"""PairLogps and the log-space helpers: what they accept, what they give at the edges."""

from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

from hf_lowmem.preference.losses import PairLogps, log1mexp, log_odds, pair_logps
from hf_lowmem.preference.losses.logps import MAX_MEAN_LOGP

EPS32 = torch.finfo(torch.float32).eps


def stacked(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Three pairs, (6, 5): log-probs zero outside the mask, as TRL's fused head gives them."""
    g = torch.Generator().manual_seed(0)
    mask = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]] * 2).roll(1, dims=1)
    return (-torch.rand(6, 5, generator=g) * mask).to(dtype), mask


def test_pair_logps_are_the_sums_and_lengths_of_each_half():
    per_token, mask = stacked()
    pairs = pair_logps(per_token, mask)
    for i in range(3):
        for half, total, length, mean in (
            (i, pairs.chosen, pairs.chosen_len, pairs.chosen_mean),
            (3 + i, pairs.rejected, pairs.rejected_len, pairs.rejected_mean),
        ):
            tokens = [v for v, m in zip(per_token[half].tolist(), mask[half].tolist(), strict=True) if m]
            assert length[i].item() == len(tokens)
            # At most 5 terms below 1: 4 additions and one division, half an ulp each, of a sum below 5.
            torch.testing.assert_close(total[i].item(), sum(tokens), rtol=0, atol=5 * 5 * EPS32 / 2)
            torch.testing.assert_close(mean[i].item(), sum(tokens) / len(tokens), rtol=0, atol=5 * 5 * EPS32 / 2)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8, torch.int32, torch.int64])
def test_mask_dtypes_and_junk_outside_the_mask(mask_dtype: torch.dtype):
    per_token, mask = stacked()
    clean = pair_logps(per_token, mask)
    junk = torch.where(mask.bool(), per_token, torch.nan)
    dirty = pair_logps(junk, mask.to(mask_dtype))
    for field in ("chosen", "rejected", "chosen_len", "rejected_len"):
        assert torch.equal(getattr(clean, field), getattr(dirty, field)), field


def test_sums_of_half_precision_are_taken_in_fp32():
    # 4096 values of -1: a bf16 accumulator stops at -256, where the spacing of bf16 becomes 2.
    pairs = pair_logps(torch.full((2, 4096), -1.0, dtype=torch.bfloat16), torch.ones(2, 4096, dtype=torch.bool))
    assert pairs.chosen.dtype == torch.float32
    assert pairs.chosen.item() == -4096
    assert pair_logps(torch.zeros(2, 3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.int64)).chosen.dtype == (
        torch.float64
    )


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_means_are_upcast(dtype: torch.dtype, computed: torch.dtype):
    length = torch.tensor([3])
    pairs = PairLogps(torch.tensor([-1.0], dtype=dtype), torch.tensor([-2.0], dtype=dtype), length, length)
    assert pairs.chosen_mean.dtype == pairs.rejected_mean.dtype == computed
    assert pairs.chosen_mean.item() == torch.tensor(-1.0, dtype=computed).div(3).item()


def test_empty_completions_give_zero_and_no_gradient():
    per_token, mask = stacked()
    mask[1] = 0  # the chosen one of pair 1
    mask[5] = 0  # the rejected one of pair 2
    leaf = per_token.clone().requires_grad_()
    pairs = pair_logps(leaf, mask)
    assert pairs.chosen_len[1] == 0 == pairs.rejected_len[2]
    assert pairs.chosen_mean[1] == 0 == pairs.rejected_mean[2]
    (pairs.chosen_mean.sum() + pairs.rejected_mean.sum()).backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad != 0, mask != 0)
    assert leaf.grad.isfinite().all()


def test_nothing_waits_for_the_device():
    """Meta tensors have no values: any read on the host would raise."""
    per_token, mask = torch.empty(4, 7, device="meta"), torch.empty(4, 7, device="meta", dtype=torch.int64)
    pairs = pair_logps(per_token, mask)
    assert pairs.chosen_mean.shape == pairs.rejected_mean.shape == (2,)


def test_frozen_and_compared_by_identity():
    per_token, mask = stacked()
    pairs, again = pair_logps(per_token, mask), pair_logps(per_token, mask)
    assert pairs == pairs
    assert pairs != again
    with pytest.raises(AttributeError):
        pairs.chosen = again.chosen  # pyright: ignore[reportAttributeAccessIssue]


SUM, LEN = torch.tensor([-1.0, -2.0]), torch.tensor([2, 3])


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ((SUM, SUM[:1], LEN, LEN), ValueError, r"PairLogps\.rejected has a shape .*'rejected': \(1,\)"),
        ((SUM, SUM, LEN, LEN[:1]), ValueError, r"PairLogps\.rejected_len has a shape"),
        ((SUM[None], SUM[None], LEN[None], LEN[None]), ValueError, r"PairLogps\.chosen has a shape .*\(B,\)"),
        ((SUM, SUM, LEN, LEN.to("meta")), ValueError, r"PairLogps\.rejected_len is on meta, chosen on cpu"),
        ((SUM, SUM.double(), LEN, LEN), TypeError, r"PairLogps\.rejected is torch\.float64: .*float32"),
        ((SUM.long(), SUM.long(), LEN, LEN), TypeError, r"PairLogps\.chosen is torch\.int64"),
        ((SUM, SUM, LEN, LEN.bool()), TypeError, r"PairLogps\.rejected_len is torch\.bool: .*numbers"),
        ((SUM, SUM, [2, 3], LEN), TypeError, r"PairLogps\.chosen_len is a list"),
        ((None, SUM, LEN, LEN), TypeError, r"PairLogps\.chosen is a NoneType"),
    ],
)
def test_bad_fields(fields: tuple, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        PairLogps(*fields)


@pytest.mark.parametrize(
    ("per_token", "mask", "error", "message"),
    [
        (
            torch.zeros(4, 5),
            torch.ones(4, 6, dtype=torch.int64),
            ValueError,
            r"\(4, 5\) and mask \(4, 6\).*shift",
        ),
        (torch.zeros(3, 5), torch.ones(3, 5, dtype=torch.int64), ValueError, r"2B, T"),
        (torch.zeros(4), torch.ones(4, dtype=torch.int64), ValueError, r"2B, T"),
        (torch.zeros(4, 5), torch.ones(4, 5), TypeError, r"mask is torch\.float32.*bool or integer"),
        (torch.zeros(4, 5).long(), torch.ones(4, 5).long(), TypeError, r"per_token_logps is torch\.int64"),
    ],
)
def test_bad_stacks(per_token: Tensor, mask: Tensor, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        pair_logps(per_token, mask)


def exact(function: Callable[[Any], Any], x: float) -> Any:
    """`function` of the floating-point number x, in 60 digits."""
    with mpmath.workdps(60):
        return +function(mpmath.mpf(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log1mexp_is_exact_on_both_branches(dtype: torch.dtype):
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    x = -torch.logspace(-12, 2, 1001, dtype=torch.float64).to(dtype)
    x = torch.cat([x, torch.linspace(-0.7, -0.69, 101, dtype=dtype)])  # both sides of the switch
    x.requires_grad_()
    got = log1mexp(x)
    (slope,) = torch.autograd.grad(got.sum(), x)
    for xi, value, gi in zip(x.tolist(), got.tolist(), slope.tolist(), strict=True):
        want = exact(lambda v: mpmath.log1p(-mpmath.exp(v)), xi)
        # A transcendental function is good to 2 ulp. log(-expm1(x)): the inner error is 2·eps relative, so
        # 2·eps absolute after the log, which adds 2·eps·|want|. log1p(-y), y = e^x <= 1/2: the inner becomes
        # 2·eps·y/(1-y) <= 4·eps·y <= 4·eps·|want|, and log1p adds 2·eps·|want|. `tiny` is for subnormal y.
        bound = 6 * eps * abs(want) if xi < -0.69315 else 2 * eps * (1 + abs(want))
        assert abs(value - want) <= bound + tiny, xi
        # e^x and 1 - e^x come with at most 3·eps each, the quotient of the two with two roundings more.
        true_slope = exact(lambda v: -1 / mpmath.expm1(-v), xi)
        assert abs(gi - true_slope) <= 7 * eps * abs(true_slope) + tiny, xi


@pytest.mark.parametrize("x", [-1e-30, -1e-12, -1e-8, -6e-8, -1e-7, -0.7, -100.0, -1e4, -1e30])
def test_log1mexp_has_no_nan_gradient_from_the_other_branch(x: float):
    leaf = torch.tensor([x], requires_grad=True)
    log1mexp(leaf).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


def test_log1mexp_gradcheck():
    x = torch.tensor([-0.2, -0.69, -0.7, -3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log1mexp, x)


def test_log_odds_stops_at_the_limit():
    logp = torch.tensor([0.0, -1e-9, MAX_MEAN_LOGP, -1e-3], dtype=torch.float64, requires_grad=True)
    r = log_odds(logp)
    r.sum().backward()
    assert logp.grad is not None
    limit = float(exact(lambda v: v - mpmath.log1p(-mpmath.exp(v)), MAX_MEAN_LOGP))
    assert r[:3].tolist() == pytest.approx([limit] * 3, rel=1e-12)
    assert r[3] < r[2] < 13.82
    # dr/dℓ = 1/(1-p): 1e6 at the limit, nothing above it.
    assert logp.grad[:2].tolist() == [0, 0]
    assert logp.grad[2].item() == pytest.approx(float(exact(lambda v: -1 / mpmath.expm1(v), MAX_MEAN_LOGP)), rel=1e-12)
    assert log_odds(torch.tensor([-1e4])).item() == -1e4


def test_lengths_may_be_floats_and_do_not_widen_the_means() -> None:
    whole = PairLogps(SUM, SUM, LEN, LEN)
    for dtype in (torch.float32, torch.float64):
        pairs = PairLogps(SUM, SUM, LEN.to(dtype), LEN.to(dtype))
        assert pairs.chosen_mean.dtype == SUM.dtype
        assert torch.equal(pairs.chosen_mean, whole.chosen_mean)
