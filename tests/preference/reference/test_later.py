"""Datasets that come after the constructor, and runs that go on: with a reference, or refused before data are read."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import IterableDataset
from peft import LoraConfig, get_peft_model

from tests.preference.reference.runs import data, first_batch, policy, trainer
from tests.training.test_trainers import losses

LORA: dict[str, Any] = {"r": 4, "target_modules": "all-linear"}
LOG_2 = pytest.approx(math.log(2), abs=1e-5)
READ: list[int] = []


def rows_that_are_counted() -> Iterator[dict[str, Any]]:
    for row in data(4):
        READ.append(1)
        yield dict(row)  # type: ignore[call-overload]


def counted() -> IterableDataset:
    READ.clear()
    return IterableDataset.from_generator(rows_that_are_counted)


def stream(rows: int = 6) -> IterableDataset:
    return data(rows).to_iterable_dataset()


@pytest.mark.train
@pytest.mark.parametrize("train", [data, stream], ids=["map", "iterable"])
@pytest.mark.parametrize("way", ["precomputed", "full", "auto"])
def test_evaluate_takes_what_the_constructor_takes(train: Any, way: str, tmp_path: Path, tokenizer: Any) -> None:
    """One dataset and a dict of them, of either kind, before training."""
    made = trainer(tmp_path, tokenizer, train=train(), evals={"a": data(3)}, lowmem_reference=way)
    for kind in (data, stream):
        assert made.evaluate(kind(3))["eval_loss"] == LOG_2
        both = made.evaluate({"one": kind(3), "two": stream(5)})
        assert (both["eval_one_loss"], both["eval_two_loss"]) == (LOG_2, LOG_2)
    assert made.evaluate()["eval_a_loss"] == LOG_2
    assert made.evaluate("a")["eval_loss"] == LOG_2
    made.train()
    assert made.evaluate()["eval_a_loss"] != LOG_2


def test_trl_s_own_field_is_the_same(tmp_path: Path, tokenizer: Any) -> None:
    made = trainer(tmp_path, tokenizer, precompute_ref_log_probs=True)
    assert made.reference_kind == "precomputed"
    assert made.evaluate(stream(3))["eval_loss"] == LOG_2


def after_training(made: Any) -> None:
    made.train()


def after_a_change_by_hand(made: Any) -> None:
    with torch.no_grad():
        made.model.model.embed_tokens.weight[3] += 1


@pytest.mark.train
@pytest.mark.parametrize(
    ("then", "says"),
    [
        (after_training, "Provide this dataset as `eval_dataset` at initialization"),  # TRL's word
        (
            after_a_change_by_hand,
            r"have been changed since the trainer was constructed.*Pass it to the trainer as eval",
        ),
    ],
)
@pytest.mark.parametrize("late", [counted, lambda: {"one": counted()}], ids=["one", "dict"])
def test_without_a_reference_no_row_is_read(then: Any, says: str, late: Any, tmp_path: Path, tokenizer: Any) -> None:
    made = trainer(tmp_path, tokenizer, lowmem_reference="precomputed", max_steps=1)
    then(made)
    with pytest.raises(ValueError, match=says):
        made.evaluate(late())
    assert READ == []


@pytest.mark.train
def test_a_freed_reference_is_missed_before_a_row_is_read(tmp_path: Path, tokenizer: Any) -> None:
    lora = {"peft_config": LoraConfig(**LORA)}
    for extra in ({}, lora):
        made = trainer(
            tmp_path, tokenizer, ref_model=policy(1), lowmem_reference="precomputed", extra=extra, max_steps=1
        )
        if extra:
            made.train()  # after which TRL still has the base of an adapter
        with pytest.raises(ValueError, match=r"freed before training"):
            made.evaluate(counted())
        assert READ == []


@pytest.mark.train
@pytest.mark.parametrize("kind", ["a config", "a PEFT model"])
def test_after_training_an_adapter_s_reference_is_still_there(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    """And is that of the start: the same loss as with the dataset in the constructor."""
    evaluated = []
    for early in (True, False):
        torch.manual_seed(3)
        lora = LoraConfig(**LORA, init_lora_weights=kind == "a config")
        extra = {"peft_config": lora} if kind == "a config" else {}
        made = trainer(
            tmp_path / str(early), tokenizer, model=policy() if extra else get_peft_model(policy(), lora), extra=extra,
            evals=data(5) if early else None, lowmem_reference="precomputed", max_steps=2,
        )  # fmt: skip
        made.train()
        evaluated.append((made.evaluate() if early else made.evaluate(stream(5)))["eval_loss"])
    assert evaluated[0] == pytest.approx(evaluated[1], abs=1e-6)
    assert evaluated[0] != LOG_2


def test_predict_reads_a_prepared_dataset_and_refuses_another_in_words(tmp_path: Path, tokenizer: Any) -> None:
    for evals in (data(3), stream(3)):
        made = trainer(tmp_path, tokenizer, evals=evals, lowmem_reference="precomputed", prediction_loss_only=True)
        assert made.predict(made.eval_dataset).metrics["test_loss"] == LOG_2
    bare = made.train_dataset.remove_columns(["ref_chosen_logps", "ref_rejected_logps"])
    other = trainer(tmp_path, tokenizer, lowmem_reference="precomputed", prediction_loss_only=True)
    with pytest.raises(ValueError, match=r"has no reference log-probabilities. Pass it to the trainer as eval_dataset"):
        other.predict(bare)


@pytest.mark.train
@pytest.mark.parametrize("train", [data, stream], ids=["map", "iterable"])
def test_a_resumed_run_has_the_reference_of_its_start(train: Any, tmp_path: Path, tokenizer: Any) -> None:
    def run(model: Any, resume: str | None = None) -> Any:
        made = trainer(
            tmp_path, tokenizer, model=model, train=train(), lowmem_reference="precomputed", max_steps=4,
            save_strategy="steps", save_steps=2,
        )  # fmt: skip
        made.train(resume_from_checkpoint=resume)
        return made

    whole = losses(run(policy()))
    assert losses(run(policy(), str(tmp_path / "checkpoint-2"))) == whole
    trained = policy()
    trained.load_state_dict(type(trained).from_pretrained(tmp_path / "checkpoint-2").state_dict())
    with pytest.raises(ValueError, match=r"started with another reference.*Pass the model that the run was started"):
        run(trained, str(tmp_path / "checkpoint-2"))


def test_two_trainers_share_what_is_cached_and_no_more(tmp_path: Path, tokenizer: Any) -> None:
    """Same folder, same data, two policies, in turns: each has log 2 at its first step."""
    data(8).save_to_disk(tmp_path / "pairs")
    for seed in (0, 1, 0, 1):
        for kind in ("map", "iterable"):
            train = type(data(1)).load_from_disk(tmp_path / "pairs")
            train = train.to_iterable_dataset() if kind == "iterable" else train
            made = trainer(tmp_path, tokenizer, model=policy(seed), train=train, lowmem_reference="precomputed")
            assert made.compute_loss(made.model, first_batch(made)).item() == LOG_2
    assert len(list(tmp_path.glob("reference_logps_*"))) == 2
