"""What every entry of PREFERENCE_LOSSES must do, whatever its formula: a new loss need only be listed."""

import inspect
import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowmem.preference.losses import PREFERENCE_LOSSES, PairLogps, PreferenceLoss, pair_logps

ALL = pytest.mark.parametrize("loss", [pytest.param(loss, id=name) for name, loss in PREFERENCE_LOSSES.items()])


def some_pairs(seed: int = 0, count: int = 13, device: str = "cpu") -> PairLogps:
    g = torch.Generator().manual_seed(seed)
    sums = [-50 * torch.rand(count, generator=g, dtype=torch.float64) - 0.1 for _ in range(2)]
    lengths = [torch.randint(1, 40, (count,), generator=g) for _ in range(2)]
    return PairLogps(*[t.to(device) for t in sums + lengths])


def reference_for(loss: PreferenceLoss, **kwargs) -> PairLogps | None:
    return some_pairs(seed=1, **kwargs) if loss.needs_reference else None


def test_the_table():
    assert all(callable(loss) and isinstance(loss.needs_reference, bool) for loss in PREFERENCE_LOSSES.values())
    assert list(PREFERENCE_LOSSES) == ["asft", "orpo", "simpo", "cpo"]
    assert not any(loss.needs_reference for loss in PREFERENCE_LOSSES.values())


@ALL
def test_options_are_keywords_with_defaults(loss: PreferenceLoss):
    policy, reference, *options = inspect.signature(loss).parameters.values()
    assert (policy.name, reference.name, reference.default) == ("policy", "reference", None)
    assert options
    for option in options:
        assert option.kind is inspect.Parameter.KEYWORD_ONLY
        assert option.default is not inspect.Parameter.empty
    assert loss.options == {option.name: option.default for option in options}
    with pytest.raises(TypeError, match="no_such_option"):
        loss(some_pairs(), reference_for(loss), no_such_option=1)


@ALL
def test_one_value_a_pair_and_detached_metrics(loss: PreferenceLoss):
    policy = some_pairs()
    policy.chosen.requires_grad_()
    value, metrics = loss(policy, reference_for(loss))
    assert value.shape == (13,)
    assert value.dtype == torch.float64
    assert value.requires_grad
    assert {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"} <= set(metrics)
    assert torch.equal(metrics["logps/chosen"], policy.chosen)
    assert torch.equal(metrics["logps/rejected"], policy.rejected)
    assert torch.equal(metrics["logps_mean/chosen"], policy.chosen / policy.chosen_len)
    assert torch.equal(metrics["logps_mean/rejected"], policy.rejected / policy.rejected_len)
    assert torch.equal(metrics["rewards/margins"], metrics["rewards/chosen"] - metrics["rewards/rejected"])
    assert torch.equal(metrics["rewards/accuracies"], (metrics["rewards/margins"] > 0).double())
    terms = [metric for name, metric in metrics.items() if name.startswith("loss/")]
    assert torch.equal(sum(terms[1:], terms[0]), value)
    for metric in metrics.values():
        assert metric.shape == (13,)
        assert not metric.requires_grad


@ALL
def test_a_pair_does_not_see_its_neighbours(loss: PreferenceLoss):
    """Any order, and any batch, gives each pair the same loss."""
    policy, reference = some_pairs(), reference_for(loss)
    value, _ = loss(policy, reference)

    def select(pairs: PairLogps | None, index: torch.Tensor) -> PairLogps | None:
        if pairs is None:
            return None
        return PairLogps(*[t[index] for t in (pairs.chosen, pairs.rejected, pairs.chosen_len, pairs.rejected_len)])

    order = torch.randperm(13, generator=torch.Generator().manual_seed(2))
    for index in (order, order[:5], torch.tensor([3])):
        picked = select(policy, index)
        assert picked is not None
        # Vector and scalar code of one function may differ by 2 ulp on each of a dozen operations.
        torch.testing.assert_close(loss(picked, select(reference, index))[0], value[index], rtol=1e-14, atol=1e-14)


@ALL
def test_a_reference_that_is_not_needed_is_refused(loss: PreferenceLoss):
    if loss.needs_reference:
        with pytest.raises(ValueError, match="reference"):
            loss(some_pairs(), None)
    else:
        with pytest.raises(ValueError, match="reference was given"):
            loss(some_pairs(), some_pairs(seed=1))


@ALL
def test_nothing_waits_for_the_device(loss: PreferenceLoss):
    """Meta tensors have no values: any read on the host would raise."""
    value, metrics = loss(some_pairs(device="meta"), reference_for(loss, device="meta"))
    assert value.device.type == "meta"
    assert all(metric.device.type == "meta" for metric in metrics.values())


@ALL
def test_raising_the_chosen_and_lowering_the_rejected_lowers_the_loss(loss: PreferenceLoss):
    policy = some_pairs()
    policy.chosen.requires_grad_()
    policy.rejected.requires_grad_()
    value, _ = loss(policy, reference_for(loss))
    value.sum().backward()
    assert policy.chosen.grad is not None
    assert policy.rejected.grad is not None
    assert (policy.chosen.grad < 0).all()
    assert (policy.rejected.grad > 0).all()


@ALL
@pytest.mark.parametrize("wrong", [-0.5, math.nan, math.inf, -math.inf])
def test_an_option_out_of_its_range_is_refused(loss: PreferenceLoss, wrong: float):
    for option in loss.options:
        with pytest.raises(ValueError, match=rf"{option}={wrong!r}: .* must be finite"):
            loss(some_pairs(), reference_for(loss), **{option: wrong})


@ALL
@pytest.mark.parametrize("wrong", ["1", None, True, torch.tensor(1.0)])
def test_an_option_that_is_no_number_is_refused(loss: PreferenceLoss, wrong: Any):
    for option in loss.options:
        with pytest.raises(TypeError, match=rf"{option}=.* must be a number"):
            loss(some_pairs(), reference_for(loss), **{option: wrong})


@ALL
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_gradcheck(loss: PreferenceLoss, scale: float):
    g = torch.Generator().manual_seed(1)
    leaves = [(-20 * torch.rand(6, generator=g, dtype=torch.float64) - 0.5).requires_grad_() for _ in range(2)]
    lengths = torch.tensor([1, 2, 3, 5, 8, 13])
    options = {option: scale * default for option, default in loss.options.items()}
    reference = some_pairs(seed=3, count=6) if loss.needs_reference else None

    def value(chosen: Tensor, rejected: Tensor) -> Tensor:
        return loss(PairLogps(chosen, rejected, lengths, lengths.flip(0)), reference, **options)[0]

    assert torch.autograd.gradcheck(value, leaves)
    assert torch.autograd.gradgradcheck(value, leaves)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("length", [1, 5, 4096])
def test_finite_where_answers_are_certain_or_impossible(loss: PreferenceLoss, dtype: torch.dtype, length: int):
    """Loss, gradient and metrics at log-probabilities of exactly 0 and of -1e4, as sums and as means."""
    edges = (0.0, -1e-7, -1e-3, -1.0, -1e4)
    grid = torch.tensor(list(product(edges, edges)))
    chosen, rejected = (column.to(dtype).requires_grad_() for column in grid.unbind(1))
    policy = PairLogps(chosen, rejected, *[torch.full((len(grid),), length)] * 2)
    value, metrics = loss(policy, some_pairs(seed=1, count=len(grid)) if loss.needs_reference else None)
    value.sum().backward()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.isfinite().all()
    for leaf in (chosen, rejected):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
    assert all(metric.isfinite().all() for metric in metrics.values())
    # Sane: the sure and right pair is the best of all, the sure and wrong one the worst.
    right = (grid[:, 0] == 0) & (grid[:, 1] == -1e4)
    wrong = (grid[:, 0] == -1e4) & (grid[:, 1] == 0)
    assert value[right] == value.min()
    assert value[wrong] == value.max()


@ALL
def test_masked_rows_and_single_tokens(loss: PreferenceLoss):
    """A row without a token has the log-probability of having said nothing: finite, and no gradient in that row."""
    mask = torch.tensor([[0, 0, 0], [0, 1, 0], [1, 1, 1], [0, 0, 1], [0, 0, 0], [1, 0, 0]])
    leaf = (-torch.rand(6, 3, generator=torch.Generator().manual_seed(0)) * mask).requires_grad_()
    value, metrics = loss(pair_logps(leaf, mask), some_pairs(seed=1, count=3) if loss.needs_reference else None)
    value.sum().backward()
    assert value.isfinite().all()
    assert all(metric.isfinite().all() for metric in metrics.values())
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert torch.equal(leaf.grad != 0, mask != 0)


@ALL
def test_fp32_is_near_fp64(loss: PreferenceLoss):
    exact = some_pairs(seed=4, count=512)
    single = PairLogps(exact.chosen.float(), exact.rejected.float(), exact.chosen_len, exact.rejected_len)
    exact = PairLogps(single.chosen.double(), single.rejected.double(), exact.chosen_len, exact.rejected_len)
    value, want = (loss(policy, reference_for(loss, count=512))[0] for policy in (single, exact))
    # Values and what they are made of are below 2·50 nats (beta 2 of a mean of at most 50): a spacing of 7.6e-6 there,
    # met by some four roundings of a half each.
    torch.testing.assert_close(value.double(), want, rtol=0, atol=4 * 0.5 * 7.7e-6)
