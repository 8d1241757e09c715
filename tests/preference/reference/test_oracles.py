"""TRL's experimental ORPO and CPO trainers as oracles of the whole loss, where the two are meant to be equal."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.preference.reference.runs import assert_same, loss_and_gradients, trainer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer


def oracle(kind: Any, model: Any, batch: dict[str, Any], **settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradients of one of TRL's trainers, without the rest of the trainer."""
    made = object.__new__(kind)
    made.accelerator = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x)
    fields = {"is_encoder_decoder": False, "aux_loss_enabled": False, "padding_value": 0, "pad_token_id": 0}
    for name, value in (fields | settings).items():
        setattr(made, name, value)
    pairs = len(batch["input_ids"]) // 2
    stacked = {}
    for side, rows in (("chosen", slice(None, pairs)), ("rejected", slice(pairs, None))):
        ids, mask = batch["input_ids"][rows], batch["completion_mask"][rows]
        stacked |= {f"{side}_input_ids": ids, f"{side}_attention_mask": batch["attention_mask"][rows]}
        stacked[f"{side}_labels"] = ids.masked_fill(mask == 0, -100)
    model.zero_grad()
    loss, _ = made.get_batch_loss_metrics(model, stacked)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def batch_of(prompt: int, chosen: list[int], rejected: list[int]) -> dict[str, Any]:
    """Pairs with prompts and answers of these lengths, of random tokens, padded to the right."""
    g = torch.Generator().manual_seed(0)
    lengths = chosen + rejected
    width = prompt + max(lengths)
    ids = torch.randint(3, 128, (len(lengths), width), generator=g)
    position = torch.arange(width)[None]
    real = (position < prompt + torch.tensor(lengths)[:, None]).long()
    completion = real * (position >= prompt)
    return {"input_ids": ids * real, "attention_mask": real, "completion_mask": completion}


@pytest.mark.parametrize("weight", [0.1, 1.5])
@pytest.mark.parametrize(
    ("chosen", "rejected"), [([5, 5, 5], [2, 9, 4]), ([7], [3])], ids=["equal answers", "one pair"]
)
def test_orpo(weight: float, chosen: list[int], rejected: list[int], tmp_path: Path, tokenizer: Any) -> None:
    """With a prompt of one token, which is not predicted, TRL's likelihood over prompt and answer is the answer's."""
    made = trainer(tmp_path, tokenizer, "orpo", orpo_lambda=weight)
    batch = batch_of(1, chosen, rejected)
    want = oracle(ORPOTrainer, made.model, batch, beta=weight)
    assert_same(loss_and_gradients(made, dict(batch)), want, atol=1e-6)


@pytest.mark.parametrize(("beta", "alpha"), [(0.1, 1.0), (0.3, 0.0)])
@pytest.mark.parametrize(
    ("chosen", "rejected"), [([5, 5, 5], [2, 9, 4]), ([7], [3])], ids=["equal answers", "one pair"]
)
def test_cpo(beta: float, alpha: float, chosen: list[int], rejected: list[int], tmp_path: Path, tokenizer: Any) -> None:
    made = trainer(tmp_path, tokenizer, "cpo", beta=beta, cpo_alpha=alpha)
    batch = batch_of(4, chosen, rejected)
    settings = {"loss_type": "sigmoid", "beta": beta, "cpo_alpha": alpha, "alpha": 0.0, "label_smoothing": 0.0}
    want = oracle(CPOTrainer, made.model, batch, **settings)
    assert_same(loss_and_gradients(made, dict(batch)), want, atol=2e-6)


@pytest.mark.parametrize(("beta", "gamma"), [(2.0, 0.5), (2.5, 1.4)])
def test_simpo(beta: float, gamma: float, tmp_path: Path, tokenizer: Any) -> None:
    """TRL's has a likelihood term unless its weight is 0, as the paper has it."""
    made = trainer(tmp_path, tokenizer, "simpo", beta=beta, simpo_gamma=gamma)
    batch = batch_of(4, [5, 3, 8], [2, 9, 4])
    settings = {"loss_type": "simpo", "beta": beta, "simpo_gamma": gamma, "cpo_alpha": 0.0, "alpha": 0.0}
    want = oracle(CPOTrainer, made.model, batch, label_smoothing=0.0, **settings)
    assert_same(loss_and_gradients(made, dict(batch)), want, atol=2e-6)


def test_where_they_differ_on_purpose(tmp_path: Path, tokenizer: Any) -> None:
    """Prompts that are predicted, and answers of unlike lengths: TRL's likelihood is the mean over all those tokens."""
    made = trainer(tmp_path, tokenizer, ["orpo", "cpo"], orpo_lambda=0.0, cpo_alpha=1.0)
    batch = batch_of(4, [5, 2], [3, 3])
    logits = made.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:2, :-1]
    nll = -logits.log_softmax(-1).gather(2, batch["input_ids"][:2, 1:, None])[..., 0].detach()
    real, completion = batch["attention_mask"][:2, 1:], batch["completion_mask"][:2, 1:]
    their_orpo = oracle(ORPOTrainer, made.model, batch, beta=0.0)[0]
    torch.testing.assert_close(their_orpo, (nll * real).sum() / real.sum(), rtol=0, atol=2e-6)
    made.compute_loss(made.model, dict(batch))
    ours = made._metrics["train"]["loss/sft"][-1]
    assert ours == pytest.approx(((nll * completion).sum(1) / completion.sum(1)).mean().item(), abs=2e-6)
    assert made._metrics["train"]["cpo/loss/sft"][-1] == pytest.approx(ours, abs=2e-6)
    assert abs(ours - their_orpo.item()) > 1e-3
