"""Whole runs: accumulation, resume, evaluation, activation tiers, optimizers, mixtures of experts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from hf_lowmem.optim import OPTIMIZERS
from hf_lowmem.preference.losses import PREFERENCE_LOSSES
from tests.conftest import tiny_llama
from tests.preference.reference.runs import assert_same, data, first_batch, loss_and_gradients, policy, trainer
from tests.training.test_trainers import losses, weights

OURS = list(PREFERENCE_LOSSES)
MIXED = ["sigmoid", "orpo"]


@pytest.mark.train
@pytest.mark.parametrize("types", [*OURS, MIXED], ids=str)
def test_accumulated_gradients_are_those_of_one_large_batch(types: Any, tmp_path: Path, tokenizer: Any) -> None:
    """A pair's loss does not depend on the batch that it comes in: one step of plain SGD ends in the same weights."""
    ends = []
    for size, steps in ((8, 1), (2, 4)):
        made = trainer(
            tmp_path, tokenizer, types, ref_model=policy(1) if types == MIXED else None, max_steps=1, optim="sgd",
            learning_rate=1.0, max_grad_norm=0.0, per_device_train_batch_size=size, gradient_accumulation_steps=steps,
        )  # fmt: skip
        made.train()
        ends.append((losses(made)[0], weights(made.model)))
    start = weights(policy())
    assert max((p - q).abs().max() for p, q in zip(start, ends[0][1], strict=True)) > 1e-2
    assert ends[1][0] == pytest.approx(ends[0][0], rel=1e-5)
    for p, q in zip(ends[1][1], ends[0][1], strict=True):
        # Gradients below 4 with a spacing of 2.4e-7, summed over eight pairs in another order.
        torch.testing.assert_close(p, q, rtol=0, atol=8 * 2.4e-7)


@pytest.mark.train
@pytest.mark.parametrize(
    ("types", "fields"),
    [
        ("asft", {"optim": "adamw", "lowmem_state": "8bit"}),
        ("orpo", {"optim": "apollo", "lowmem_rank": 4}),
        (MIXED, {"lowmem_reference": "precomputed"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True], ids=["map", "iterable"])
def test_resume_is_bit_equal(types: Any, fields: dict[str, Any], stream: bool, tmp_path: Path, tokenizer: Any) -> None:
    def run(folder: str) -> Any:
        rows = data().to_iterable_dataset() if stream else data()
        return trainer(
            tmp_path / folder, tokenizer, types, train=rows, max_steps=6, save_strategy="steps", save_steps=3,
            ref_model=policy(1) if types == MIXED else None, gradient_accumulation_steps=2, **fields,
        )  # fmt: skip

    whole = run("whole")
    whole.train()
    resumed = run("whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert all(torch.equal(p, q) for p, q in zip(weights(whole.model), weights(resumed.model), strict=True))
    assert losses(whole) == losses(resumed)


@pytest.mark.parametrize("types", [*OURS, MIXED, "sigmoid"], ids=str)
def test_evaluation_and_compute_metrics(types: Any, tmp_path: Path, tokenizer: Any) -> None:
    seen = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {"finite": float(torch.tensor(prediction.predictions).isfinite().all())}

    reference = policy(1) if "sigmoid" in types else None
    made = trainer(
        tmp_path, tokenizer, types, ref_model=reference, evals=data(4), extra={"compute_metrics": compute_metrics},
        per_device_eval_batch_size=4,
    )  # fmt: skip
    got = made.evaluate()
    assert got["eval_finite"] == 1.0
    assert seen[0][0] == 8  # chosen and rejected rows of four pairs
    assert seen[0][2] == 128
    plain = trainer(tmp_path, tokenizer, types, ref_model=reference and policy(1), evals=data(4))
    batch = first_batch(plain, 4)
    want = plain.compute_loss(plain.model.eval(), batch)
    assert got["eval_loss"] == pytest.approx(want.item(), abs=1e-5)
    chosen = [v for n, v in got.items() if n == "eval_logps_mean/chosen"]
    assert chosen[0] == pytest.approx(plain._metrics["eval"]["logps_mean/chosen"][-1], abs=1e-5)


@pytest.mark.parametrize("types", [*OURS, MIXED], ids=str)
def test_activation_tiers(types: Any, tmp_path: Path, tokenizer: Any) -> None:
    """exact changes nothing; fp8 little, in the loss nothing."""
    runs = {}
    for tier in (None, "exact", "fp8"):
        reference = policy(1) if types == MIXED else None
        made = trainer(tmp_path, tokenizer, types, ref_model=reference, lowmem_activations=tier)
        made.create_optimizer()  # from here on the tier is on the model
        runs[tier] = loss_and_gradients(made)
        assert (made.activations is None) == (tier is None)
    assert_same(runs["exact"], runs[None], atol=0)
    assert runs["fp8"][0] == runs[None][0]
    assert any(not torch.equal(runs["fp8"][1][n], g) for n, g in runs[None][1].items())


@pytest.mark.train
@pytest.mark.parametrize("optim", list(OPTIMIZERS))
def test_every_optimizer_lowers_a_mixture(optim: str, tmp_path: Path, tokenizer: Any) -> None:
    rank: dict[str, Any] = {"lowmem_rank": 4} if OPTIMIZERS[optim].DEFAULTS.get("rank", 0) > 4 else {}
    made = trainer(
        tmp_path, tokenizer, ["sigmoid", "asft"], optim=optim, lowmem_reference="auto", max_steps=8,
        lowmem_state="fp8", per_device_train_batch_size=8, learning_rate=2e-3, **rank,
    )  # fmt: skip
    made.train()
    got = losses(made)
    assert len(got) == 8
    assert min(got[-3:]) < got[0]


def mixtral() -> Any:
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=64, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
        output_router_logits=True, router_aux_loss_coef=0.5,
    )  # fmt: skip
    return MixtralForCausalLM(config)


@pytest.mark.train
@pytest.mark.parametrize("types", [["asft"], ["orpo", "sft"]], ids=str)
def test_the_router_s_loss_is_added_once(types: list[str], tmp_path: Path, tokenizer: Any) -> None:
    with_router = trainer(tmp_path, tokenizer, types, model=mixtral())
    without = trainer(tmp_path, tokenizer, types, model=mixtral(), router_aux_loss_coef=0.0)
    got, plain = (loss_and_gradients(made)[0] for made in (with_router, without))
    aux = with_router._metrics["train"]["aux_loss"][-1]
    assert aux > 0
    assert (got - plain).item() == pytest.approx(0.5 * aux, abs=2e-6)
    with_router.train()
    assert "aux_loss" in with_router.state.log_history[0]


@pytest.mark.train
def test_collapse_can_be_seen(tmp_path: Path, tokenizer: Any) -> None:
    """DPO's margin grows while both answers become unlikely; the log says so, in training and in evaluation."""
    made = trainer(
        tmp_path, tokenizer, "sigmoid", model=tiny_llama(), ref_model=tiny_llama(), max_steps=30, beta=0.1,
        per_device_train_batch_size=8, learning_rate=3e-2, evals=data(8),
    )  # fmt: skip
    before = made.evaluate()
    made.train()
    after = made.evaluate()
    assert after["eval_rewards/accuracies"] > 0.9
    assert after["eval_logps_mean/rejected"] < before["eval_logps_mean/rejected"]
    rows = [row for row in made.state.log_history if "logps_mean/chosen" in row]
    assert len(rows) == 30
    lengths = [len(row["chosen_ids"]) for row in made.eval_dataset]
    sums = after["eval_logps/chosen"], after["eval_logps_mean/chosen"]
    assert min(lengths) <= sums[0] / sums[1] <= max(lengths)
