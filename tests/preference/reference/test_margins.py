"""Dynamic reward scaling: the paper's formula, pair by pair, from a column that survives the way to the loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset

from tests.preference.reference.runs import ROWS, assert_same, data, first_batch, loss_and_gradients, policy, trainer
from tests.training.test_trainers import losses

MARGINS = [0.0, 0.25, 1.0, 3.0, 10.0, 100.0, *[0.5] * 10]


def with_margins(values: list[Any] | None = None, column: str = "margin") -> Dataset:
    return data().add_column(column, MARGINS if values is None else values)  # pyright: ignore[reportCallIssue]


def stream() -> IterableDataset:
    return with_margins().to_iterable_dataset()


@pytest.mark.train
@pytest.mark.parametrize(("w", "k"), [(None, None), (0.2, 2.0)])
@pytest.mark.parametrize("reference", [None, "precomputed"])
@pytest.mark.parametrize("train", [with_margins, stream], ids=["map", "iterable"])
def test_it_is_the_formula(
    w: float | None, k: float | None, reference: str | None, train: Any, tmp_path: Path, tokenizer: Any
) -> None:
    """β(δ) = β(1 + w(1 - e^(-kδ))), equation of section 4.2 of arXiv 2502.10391, w = k = 0.5, in [β, (1 + w)β]."""
    made = trainer(
        tmp_path, tokenizer, ref_model=policy(1), train=train(), lowmem_reference=reference, max_steps=8, beta=0.3,
        lowmem_margin_column="margin", lowmem_margin_w=w, lowmem_margin_k=k,
    )  # fmt: skip
    plain = trainer(tmp_path, tokenizer, ref_model=policy(1), train=train(), beta=0.3)
    batch = first_batch(made)
    got = loss_and_gradients(made, dict(batch))
    w, k = w or 0.5, k or 0.5
    margins = torch.tensor(MARGINS[:ROWS], dtype=torch.float64)
    betas = 0.3 * (1 + w * (1 - torch.exp(-k * margins)))
    assert betas[0] == 0.3
    assert betas.max() <= 0.3 * (1 + w)

    chosen, rejected = reference_logps(plain, batch)
    logps = plain.model(**tokens(batch), fused_lm_head=True).log_probs.sum(dim=1).chunk(2)
    want = -F.logsigmoid(betas * ((logps[0] - chosen) - (logps[1] - rejected)).double()).mean().float()
    plain.model.zero_grad()
    want.backward()
    gradients = {n: p.grad.clone() for n, p in plain.model.named_parameters()}
    assert_same(got, (want.detach(), gradients), atol=1e-6)
    assert abs(got[0] - loss_and_gradients(plain)[0]) > 1e-4
    assert made.beta == 0.3
    rewards = made._metrics["train"]["rewards/chosen"][-1]
    assert rewards == pytest.approx((betas * (logps[0] - chosen).detach().double()).mean().item(), abs=1e-5)
    made.train()
    assert len(losses(made)) == 8


def tokens(batch: dict[str, Any]) -> dict[str, Any]:
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


def reference_logps(made: Any, batch: dict[str, Any]) -> Any:
    with torch.no_grad():
        return made.ref_model(**tokens(batch), fused_lm_head=True).log_probs.sum(dim=1).chunk(2)


def test_beside_other_losses_it_scales_dpo_alone(tmp_path: Path, tokenizer: Any) -> None:
    scaled: dict[str, Any] = {"ref_model": policy(1), "train": with_margins(), "lowmem_margin_column": "margin"}
    whole = loss_and_gradients(trainer(tmp_path, tokenizer, ["asft", "sigmoid", "sft"], **scaled))[0]
    parts = [trainer(tmp_path, tokenizer, "sigmoid", **scaled), trainer(tmp_path, tokenizer, ["asft", "sft"])]
    want = sum(loss_and_gradients(part)[0] for part in parts)
    torch.testing.assert_close(whole, want, rtol=0, atol=3e-6)  # values below 16, with a spacing of 9.5e-7


@pytest.mark.parametrize("train", [data, lambda: data().to_iterable_dataset()], ids=["map", "iterable"])
def test_a_missing_column_is_named(train: Any, tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"lowmem_margin_column='margin': train_dataset has no such column.*prompt"):
        trainer(tmp_path, tokenizer, train=train(), lowmem_margin_column="margin")
    with pytest.raises(ValueError, match=r"lowmem_margin_column='margin': eval_dataset has no such column"):
        trainer(tmp_path, tokenizer, train=with_margins(), evals=train(), lowmem_margin_column="margin")
    named = {"easy": with_margins(), "hard": train()}
    with pytest.raises(ValueError, match=r"lowmem_margin_column='margin': hard has no such column"):
        trainer(tmp_path, tokenizer, train=with_margins(), evals=named, lowmem_margin_column="margin")


@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf"), None])
def test_a_margin_that_is_none_is_refused(value: float | None, tmp_path: Path, tokenizer: Any) -> None:
    rows = with_margins([value, *MARGINS[1:]])
    made = trainer(tmp_path, tokenizer, ref_model=policy(1), train=rows, lowmem_margin_column="margin")
    with pytest.raises(ValueError, match=rf"lowmem_margin_column='margin' holds {value}.*finite number >= 0"):
        first_batch(made)


def test_a_later_dataset_needs_the_column_too(tmp_path: Path, tokenizer: Any) -> None:
    rows = with_margins(column="score")
    made = trainer(tmp_path, tokenizer, ref_model=policy(1), train=rows, evals=rows, lowmem_margin_column="score")
    assert made.evaluate()["eval_loss"] > 0
    with pytest.raises(ValueError, match="lowmem_margin_column='score' holds None"):
        made.evaluate(data(4))


@pytest.mark.train
@pytest.mark.parametrize("reference", ["full", "precomputed"])
def test_it_is_the_same_with_a_step_in_backward_and_with_shared_prompts(
    reference: str, tmp_path: Path, tokenizer: Any
) -> None:
    ended = []
    settings: tuple[dict[str, Any], ...] = ({}, {"lowmem_step_in_backward": True}, {"lowmem_share_prompt": True})
    for more in settings:
        made = trainer(
            tmp_path, tokenizer, model=policy(), train=with_margins(), lowmem_margin_column="margin", optim="adamw",
            lowmem_reference=reference, max_steps=3, beta=0.3, max_grad_norm=0, **more,
        )  # fmt: skip
        made.train()
        ended.append((losses(made), [p.detach().clone() for p in made.model.parameters()]))
    plain, in_backward, shared = ended
    assert in_backward[0] == plain[0]
    assert all(torch.equal(p, q) for p, q in zip(plain[1], in_backward[1], strict=True))
    # Another order of sums, which Adam's first steps turn into whole rates where gradients are nearly zero.
    assert shared[0] == pytest.approx(plain[0], abs=1e-4)
