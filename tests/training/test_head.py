"""The output head's gradient by blocks: the bits of TRL's, without a gradient that exists whole; else it is said why."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from hf_lowmem import LowMemDPOConfig, LowMemDPOTrainer, LowMemSFTConfig, LowMemSFTTrainer
from hf_lowmem.runs.report import read_report
from hf_lowmem.training import head as head_module
from hf_lowmem.training import head_blocks
from hf_lowmem.training.head import BlockedHead, HeadFunction
from tests.conftest import tiny_llama, word_tokenizer
from tests.training.test_trainers import losses, pair_data, settings, token_data, weights

pytestmark = pytest.mark.train

TILE = 32  # columns of TRL's tile, for the test: four blocks of the vocabulary of 128


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of vocabulary, and of tokens."""
    monkeypatch.setattr(trl_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", TILE)
    monkeypatch.setattr(chunked_logprob, "TOKEN_CHUNK_SIZE", 16)


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
    tmp_path: Path, *, model: Any = None, dtype: torch.dtype = torch.bfloat16, data: Any = None, **fields: Any
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
    )
    trainer.train()
    return trainer


def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's function, as it is."""
    for cls in (LowMemSFTTrainer, LowMemDPOTrainer):
        monkeypatch.setattr(cls, "HEAD", None)


def same(a: Any, b: Any) -> None:
    for (name, p), q in zip(a.model.named_parameters(), b.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert losses(a) == losses(b)


def norms(trainer: Any) -> list[float]:
    return [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]


@pytest.mark.parametrize("loss", ["nll", "asft"])
@pytest.mark.parametrize("optim", ["adamw", "lion", "apollo_mini"])
def test_twenty_steps_have_the_bits_of_trls(
    optim: str, loss: str, tiles: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = in_backward(optim=optim, loss_type=loss, max_steps=20, learning_rate=1e-3)
    ours = train(tmp_path, **fields)
    assert ours.output_head.facts() == {"block_rows": TILE, "passes_by_rows": 20, "passes_whole": 0, "why": None}
    without(monkeypatch)
    theirs = train(tmp_path, **fields)
    same(ours, theirs)
    assert norms(ours) == pytest.approx(norms(theirs), rel=1e-5)  # another order of sums
