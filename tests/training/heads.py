"""Runs whose output head is stepped by blocks, and what is compared of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from hf_lowmem import LowMemDPOConfig, LowMemDPOTrainer, LowMemSFTConfig, LowMemSFTTrainer
from hf_lowmem.weights import resting
from tests.conftest import tiny_llama, word_tokenizer
from tests.training.test_trainers import losses, pair_data, settings, token_data

TILE = 32  # columns of TRL's tile, for the test: four blocks of the vocabulary of 128


def in_backward(**others: Any) -> dict[str, Any]:
    return {
        "optim": "adamw",
        "lowmem_state": "8bit",
        "lowmem_weights": "bf16_sr",
        "lowmem_step_in_backward": True,
        "max_grad_norm": 0.0,
    } | others


def masked_data() -> Dataset:
    """Prompts that are not trained on, of several lengths, so that rows are padded."""
    rows = token_data()
    data = [
        {"input_ids": ids[: 6 + i % 6], "labels": [-100] * 3 + ids[3 : 6 + i % 6]}
        for i, ids in enumerate(rows["input_ids"])
    ]
    return Dataset.from_list(data)


def train(
    tmp_path: Path,
    *,
    model: Any = None,
    dtype: torch.dtype = torch.bfloat16,
    data: Any = None,
    peft_config: Any = None,
    **fields: Any,
) -> Any:
    """A trained SFT or DPO trainer, by whether the fields have a loss of pairs."""
    pairs = "loss_type" in fields and fields["loss_type"] not in ("nll", "dft")
    config, cls = (LowMemDPOConfig, LowMemDPOTrainer) if pairs else (LowMemSFTConfig, LowMemSFTTrainer)
    if data is None:
        data = pair_data() if pairs else masked_data()
    trainer = cls(
        tiny_llama(dtype=dtype) if model is None else model,
        args=settings(config, tmp_path, **fields),
        train_dataset=data,
        processing_class=word_tokenizer(),
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's function, as it is."""
    for cls in (LowMemSFTTrainer, LowMemDPOTrainer):
        monkeypatch.setattr(cls, "HEAD", None)


def same(a: Any, b: Any) -> None:
    theirs = b.model.state_dict()
    for name, values in a.model.state_dict().items():
        assert torch.equal(values, theirs[name]), name
    for kept, other in zip(resting(a.model).values(), resting(b.model).values(), strict=True):
        assert all(map(torch.equal, kept.stored(), other.stored())), kept.name
    assert losses(a) == losses(b)


def norms(trainer: Any) -> list[float]:
    return [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
