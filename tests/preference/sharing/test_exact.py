"""Sharing changes where tokens stand, and no number beyond rounding: log-probabilities, gradients, metrics."""

import copy
import pickle
from typing import Any

import pytest
import torch

from hf_lowmem.activations import convert, undo
from hf_lowmem.preference.sharing import check_sharing, share_prompts, unshare_prompts
from hf_lowmem.preference.sharing.check import sharing_error
from hf_lowmem.preference.sharing.share import SharedForward, backbone_of
from tests.preference.sharing.families import (
    FAMILIES,
    LENGTHS,
    batch,
    both,
    examples,
    gradients,
    loss_of,
    outputs_of,
    tiny,
)

SIZE = sum(p + c + r for p, c, r in LENGTHS)
# Of log-probabilities summed over a completion: sums here stay below 64, where one unit in the last place is 3.8e-6.
LOGPS = 1e-5
# Rounding errors of a sum of n terms grow with sqrt(n) u (Higham and Mary, 2019, eq. 2.12), u = 2**-24; a gradient is a
# chain of matrix products, here at most 7 of 6 layers, forward and backward, and the head's, of sums of at most 128.
GRADIENTS = (2 * 7 * 6 + 2) * 128**0.5 * 2**-24


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Each parameter's by its own largest entry, or, where all of it is rounding, no more than rounding.

    So it is with OPT's bias of keys: it shifts all scores of a query alike, its true gradient is 0.
    """
    assert found.keys() == expected.keys()
    rounding = GRADIENTS * max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        size = gradient.abs().max()
        error = (found[name] - gradient).abs().max()
        assert error <= (GRADIENTS * size if size > rounding else rounding), f"{name}: {error:.1e} beside {size:.1e}"


@pytest.mark.parametrize("budget", [None, 33, SIZE])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_and_gradients_are_those_of_the_plain_batch(family: str, budget: int | None) -> None:
    made = batch(budget)
    model, plain = both(family, made)
    expected, found = outputs_of(model, plain), outputs_of(model, made)
    assert (found.log_probs.sum(dim=1) - expected.log_probs.sum(dim=1)).abs().max() <= LOGPS
    assert expected.log_probs.sum(dim=1).abs().max() < 64
    for name in ("log_probs", "entropy", "mean_logits"):
        torch.testing.assert_close(found[name], expected[name], atol=LOGPS, rtol=0)
    assert torch.equal(found.is_top1, expected.is_top1)
    assert torch.equal(found.label_mask, expected.label_mask)
    assert_close(gradients(model, made), gradients(model, plain))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_trial_finds_these_models_exact(family: str) -> None:
    model = tiny(family)
    model.train()
    check_sharing(model)
    assert sharing_error(model)[0] <= GRADIENTS
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("family", ["llama", "gemma2, windows"])
def test_truncated_batches_are_exact(family: str, mode: str) -> None:
    made = batch(48, examples([(20, 3, 3)]), max_length=16, truncation_mode=mode, pad_to_multiple_of=8)
    model, plain = both(family, made)
    expected, found = outputs_of(model, plain).log_probs, outputs_of(model, made).log_probs
    assert (found.sum(dim=1) - expected.sum(dim=1)).abs().max() <= LOGPS
    assert_close(gradients(model, made), gradients(model, plain))


def count_tokens(model: Any, inputs: dict[str, Any]) -> int:
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(lambda m, args, out: seen.append(args[0].numel()))
    loss_of(model, inputs)
    hook.remove()
    return sum(seen)


def test_a_pair_costs_its_prompt_once() -> None:
    made = batch(SIZE)
    model, plain = both("llama", made)
    assert count_tokens(model, made) == SIZE
    assert (
        count_tokens(model, plain)
        == plain["input_ids"].numel()
        == 2 * len(LENGTHS) * max(p + max(c, r) for p, c, r in LENGTHS)
    )


@pytest.mark.parametrize(("prompt", "chosen", "rejected"), [(16, 4, 4), (12, 5, 3), (0, 3, 2), (5, 1, 1)])
def test_one_pair_costs_what_it_says(prompt: int, chosen: int, rejected: int) -> None:
    made = batch(None, examples([(prompt, chosen, rejected)])[-1:])
    model, _ = both("llama", made)
    assert count_tokens(model, made) == prompt + chosen + rejected


def test_packing_changes_no_loss() -> None:
    losses = [loss_of(both("llama", batch(budget))[0], batch(budget)).item() for budget in (None, 24, 33, SIZE)]
    assert max(losses) - min(losses) <= LOGPS


@pytest.mark.parametrize("family", ["llama", "gemma3, windows", "gpt2", "opt"])
def test_logits_for_compute_metrics_keep_their_shape(family: str) -> None:
    """Without the fused head: `DPOTrainer` asks for logits once more, with the same tensors."""
    made = batch(33)
    model, plain = both(family, made)
    del made["completion_mask"], plain["completion_mask"]
    with torch.no_grad():
        expected, found = model(**plain).logits, model(**made).logits
    real = plain["attention_mask"].bool()
    assert found.shape == expected.shape
    torch.testing.assert_close(found[real], expected[real], atol=LOGPS, rtol=0)


def test_plain_batches_run_as_before() -> None:
    model, plain = both("llama", batch())
    patched = outputs_of(model, plain).log_probs
    unshare_prompts(model)
    assert "forward" not in vars(backbone_of(model))
    assert torch.equal(outputs_of(model, plain).log_probs, patched)
    unshare_prompts(model)


def test_twice_is_once_and_nothing_is_left_behind() -> None:
    model = tiny("llama")
    names = list(model.state_dict())
    share_prompts(model)
    first = vars(backbone_of(model))["forward"]
    share_prompts(model)
    assert vars(backbone_of(model))["forward"] is first
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_shares_by_itself(again: Any) -> None:
    """Of the backbone: TRL's fused head is a closure, which does not pickle."""
    backbone = backbone_of(both("llama", batch())[0])
    other = again(backbone)
    assert isinstance(other.forward, SharedForward)
    assert other.forward.module is other
    with torch.no_grad():
        other.embed_tokens.weight.zero_()
    made = batch()
    del made["completion_mask"]
    assert not torch.equal(other(**made).last_hidden_state, backbone(**made).last_hidden_state)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    made = batch(33)
    model, _ = both("gemma2, windows", made)
    model.train()
    expected = gradients(model, made)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = gradients(model, made)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("tier", ["exact", "fp8", "checkpoint_fp8"])
def test_activation_tiers(tier: str) -> None:
    """Exact: the same gradients bit for bit. The others: the same loss, and gradients as with a plain batch."""
    made = batch(33)
    model, plain = both("llama", made)
    model.train()
    expected, loss = gradients(model, made), loss_of(model, made)
    convert(model, tier)
    found = gradients(model, made)
    assert torch.equal(loss_of(model, made), loss)
    if tier == "exact":
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
        undo(model)
        assert isinstance(backbone_of(model).forward, SharedForward)
        return
    lossy = gradients(model, plain)
    for name, gradient in expected.items():
        # Other codes, as other tokens stand beside each other, but errors of the same size: within twice the plain's.
        allowed = 2 * (lossy[name] - gradient).norm()
        assert (found[name] - gradient).norm() <= allowed, name


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", ["llama", "llama, eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_differs_by_its_rounding(family: str, dtype: torch.dtype, autocast: bool) -> None:
    """Judged by the truth, the same model in fp32: shared is off by no more than twice what plain is off."""
    made = batch(33)
    model, plain = both(family, made)
    truth = outputs_of(model, plain).log_probs
    if not autocast:
        model.to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        errors = [(outputs_of(model, inputs).log_probs.float() - truth).norm() for inputs in (plain, made)]
    assert 0 < errors[1] <= 2 * errors[0]
