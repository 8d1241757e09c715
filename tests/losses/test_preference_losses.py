"""What every entry of PREFERENCE_LOSSES must do, whatever its formula: a new loss need only be listed."""

import inspect

import pytest
import torch

from hf_lowmem.losses import PREFERENCE_LOSSES, PairLogps, PreferenceLoss

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
    assert PREFERENCE_LOSSES["asft"].needs_reference is False


@ALL
def test_options_are_keywords_with_defaults(loss: PreferenceLoss):
    policy, reference, *options = inspect.signature(loss).parameters.values()
    assert (policy.name, reference.name, reference.default) == ("policy", "reference", None)
    assert options
    for option in options:
        assert option.kind is inspect.Parameter.KEYWORD_ONLY
        assert option.default is not inspect.Parameter.empty
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
    assert {"logps/chosen", "logps/rejected"} <= set(metrics)
    assert torch.equal(metrics["logps/chosen"], policy.chosen)
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
