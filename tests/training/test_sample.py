"""`lowmem_sample` through the trainers: resumed to the bit, beside a step in backward and accumulation, taken off."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lowmem.patching import forwards_of
from tests.training.test_resume import check_step_in_backward, make

pytestmark = pytest.mark.train

SAMPLE: dict[str, Any] = {"lowmem_sample": 0.3}


def weights(trainer: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("Trainer", {"optim": "adamw"}), ("SFTTrainer", {"optim": "adamw_torch"}), ("DPOTrainer", {"loss_type": "orpo"})],
)
def test_a_resumed_run_is_the_same_bit_for_bit(
    kind: str, fields: dict[str, Any], tmp_path: Path, tokenizer: Any
) -> None:
    whole = make(kind, tmp_path, torch.float32, tokenizer, **SAMPLE | fields)
    whole.train()
    assert "linears keep 30.0%" in str(whole.samples)
    assert not any(list(forwards_of(module)) for module in whole.model.modules())
    again = make(kind, tmp_path, torch.float32, tokenizer, **SAMPLE | fields)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(map(torch.equal, weights(whole), weights(again)))
    other = make(kind, tmp_path / "seed", torch.float32, tokenizer, **SAMPLE | fields | {"seed": 7, "data_seed": 42})
    assert "linears" in str(other.samples)
    plain = make(kind, tmp_path / "plain", torch.float32, tokenizer, **fields)
    plain.train()
    assert not all(map(torch.equal, weights(whole), weights(plain)))


def test_a_step_in_backward_trains_the_same(tmp_path: Path, tokenizer: Any) -> None:
    check_step_in_backward(tmp_path, tokenizer, SAMPLE)
