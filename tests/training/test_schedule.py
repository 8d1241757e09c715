"""`lowmem_schedule` through the trainers: the rates that are logged, a resumed run, a loop, and errors of the field."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from hf_lowmem import LowMemSFTConfig, LowMemSFTTrainer, LowMemTrainer, LowMemTrainingArguments
from hf_lowmem.optim.schedules import PowerSpec
from tests.conftest import tiny_llama
from tests.training.test_resume import make

POWER: dict[str, Any] = {
    "lowmem_schedule": "power",
    "lr_scheduler_kwargs": {"tokens_per_step": 64, "a": 2.0, "decay_steps": 2},
}
COMMON: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none"}


def logged(trainer: Any) -> list[float]:
    return [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]


@pytest.mark.train
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("Trainer", {"optim": "adamw_torch"}),
        ("SFTTrainer", {"optim": "apollo_mini"}),
        ("DPOTrainer", {"optim": "lion"}),
    ],
)
def test_a_resumed_run_is_the_same_bit_for_bit(
    kind: str, fields: dict[str, Any], tmp_path: Path, tokenizer: Any
) -> None:
    whole = make(kind, tmp_path, torch.float32, tokenizer, **POWER | fields)
    whole.train()
    law = PowerSpec(64, a=2.0).law
    low = (0.01**0.5 - 0.01) / 0.99
    assert logged(whole) == pytest.approx([0, law(2) / 2, law(2), law(3), law(4), low * law(4)], rel=1e-12)
    again = make(kind, tmp_path, torch.float32, tokenizer, **POWER | fields)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert logged(again) == logged(whole)
    assert all(map(torch.equal, whole.model.parameters(), again.model.parameters()))


@pytest.mark.train
def test_packed_rows_say_themselves_how_many_tokens_a_step_has(tmp_path: Path, tokenizer: Any) -> None:
    args = LowMemSFTConfig(
        str(tmp_path), packing=True, max_length=32, per_device_train_batch_size=3, gradient_accumulation_steps=2,
        max_steps=2, learning_rate=0.02, lowmem_schedule="power", lr_scheduler_kwargs={"decay_steps": 0}, **COMMON,
    )  # fmt: skip
    rows = Dataset.from_dict({"input_ids": [list(range(3, 30))] * 40})
    trainer = LowMemSFTTrainer(tiny_llama(), args, train_dataset=rows, processing_class=tokenizer)
    trainer.create_optimizer()
    schedule = trainer.create_scheduler(400)
    assert trainer.create_scheduler(400) is schedule
    for _ in range(300):
        trainer.optimizer.step()
        schedule.step()
    assert schedule.get_last_lr()[0] == pytest.approx(min(0.02, PowerSpec(192).law(300)), rel=1e-12)


def test_a_scheduler_that_was_passed_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters())
    passed = torch.optim.lr_scheduler.ConstantLR(optimizer)
    args = LowMemTrainingArguments(str(tmp_path), **COMMON, **POWER)
    with pytest.raises(ValueError, match="lowmem_schedule='power' has no effect: a ConstantLR was passed"):
        LowMemTrainer(model, args, optimizers=(optimizer, passed))
    assert TrainingArguments(str(tmp_path), **COMMON).lr_scheduler_type == "linear"  # what stands for "not set"


@pytest.mark.parametrize(
    ("fields", "error", "what"),
    [
        ({"lowmem_schedule": "cosine"}, ValueError, "lowmem_schedule='cosine' is not available.*power"),
        ({"lowmem_schedule": 3}, TypeError, "lowmem_schedule=3: expected a string"),
        ({"lowmem_schedule": "power"}, ValueError, "needs the tokens that a step trains on.*tokens_per_step"),
        (POWER | {"lr_scheduler_kwargs": {"tokens_per_step": 0}}, ValueError, "lr_scheduler_kwargs: tokens_per_step=0"),
        (
            POWER | {"lr_scheduler_kwargs": '{"tokens_per_step": "x"}'},
            TypeError,
            "lr_scheduler_kwargs: tokens_per_step=",
        ),
        (POWER | {"lr_scheduler_kwargs": {"tokens": 3}}, ValueError, "lr_scheduler_kwargs: option='tokens'"),
    ],
)
def test_a_wrong_field_is_refused(fields: dict[str, Any], error: type[Exception], what: str, tmp_path: Path) -> None:
    for config in (LowMemTrainingArguments, LowMemSFTConfig):
        with pytest.raises(error, match=what):
            config(str(tmp_path), **COMMON, **fields)
