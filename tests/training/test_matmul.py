"""`lowmem_matmul` through every door: trained, resumed, stepped in backward, taken off; and errors of its fields."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_lowmem import LowMemSFTConfig, LowMemTrainingArguments
from hf_lowmem.matmul.linear import Linear8
from hf_lowmem.patching import forwards_of
from hf_lowmem.training.plugin import LowMemPlugin
from hf_lowmem.weights import at_rest, wake
from tests.activations.models import batch, build
from tests.conftest import tiny_llama
from tests.contracts.test_optimizers import same_bits
from tests.training.test_resume import check_step_in_backward, make

pytestmark = pytest.mark.train

EIGHT: dict[str, Any] = {"lowmem_matmul": "fp8_row", "lowmem_matmul_least": 0}


def multiplies(model: nn.Module) -> int:
    return sum(isinstance(patch, Linear8) for module in model.modules() for patch in forwards_of(module))


def weights(trainer: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("Trainer", {"optim": "adamw", "lowmem_matmul": "int8_row"}),
        ("SFTTrainer", {"optim": "adamw_torch", "lowmem_activations": "fp8"}),
        ("DPOTrainer", {"optim": "adamw", "lowmem_activations": "checkpoint_fp8", "loss_type": "orpo"}),
        ("DPOTrainer", {"optim": "adamw"}),
    ],
)
def test_a_resumed_run_is_the_same_bit_for_bit(
    kind: str, fields: dict[str, Any], tmp_path: Path, tokenizer: Any
) -> None:
    whole = make(kind, tmp_path / "whole", torch.float32, tokenizer, **EIGHT | fields)
    whole.train()
    assert "linears" in str(whole.products)
    assert not multiplies(whole.model)
    again = make(kind, tmp_path / "again", torch.float32, tokenizer, **EIGHT | fields)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert all(map(same_bits, weights(whole), weights(again)))
    plain = make(kind, tmp_path / "plain", torch.float32, tokenizer, **fields | {"lowmem_matmul": None})
    plain.train()
    assert not all(map(torch.equal, weights(whole), weights(plain)))


def test_a_step_in_backward_trains_the_same(tmp_path: Path, tokenizer: Any) -> None:
    check_step_in_backward(tmp_path, tokenizer, EIGHT)


def test_a_loop_of_ones_own_has_products_until_remove() -> None:
    plugin = LowMemPlugin(optim="adamw", **EIGHT)
    accelerator = Accelerator(cpu=True)
    model, optimizer = plugin.prepare(accelerator, build("llama").train())
    there = multiplies(model)
    assert there == len(plugin.products.handled if plugin.products else []) > 0
    accelerator.backward(model(**batch()).loss)
    optimizer.step()
    plugin.remove()
    assert not multiplies(model)


def test_adapters_on_a_frozen_model_are_trained() -> None:
    model = get_peft_model(tiny_llama().train(), LoraConfig(r=4, target_modules="all-linear"))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    plugin = LowMemPlugin(optim="adamw", learning_rate=1e-2, **EIGHT)
    accelerator = Accelerator(cpu=True)
    model, optimizer = plugin.prepare(accelerator, model)
    frozen = {kept.name: (kept, kept.codes.clone()) for p in model.parameters() if (kept := at_rest(p)) is not None}
    for _ in range(2):
        ids = torch.arange(64).view(2, 32)
        accelerator.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()
    plugin.remove()
    assert frozen
    assert all(torch.equal(kept.codes, codes) for kept, codes in frozen.values())
    assert all("lora_" in n for n in before)
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    woken: Any = wake(model)
    merged = woken.merge_and_unload()  # of what the codes stand for
    assert merged.model.layers[0].mlp.up_proj.weight.isfinite().all()


@pytest.mark.parametrize(
    ("fields", "error", "what"),
    [
        ({"lowmem_matmul": "fp8"}, ValueError, "lowmem_matmul='fp8'.*fp8_row"),
        ({"lowmem_matmul": True}, TypeError, "lowmem_matmul=True"),
        (EIGHT | {"lowmem_matmul_least": -1}, ValueError, "lowmem_matmul_least=-1: must be at least 0"),
        (EIGHT | {"lowmem_matmul_least": 1.5}, TypeError, "lowmem_matmul_least=1.5"),
        ({"lowmem_matmul_least": 0}, ValueError, "lowmem_matmul_least=0 has no effect without lowmem_matmul"),
    ],
)
def test_a_wrong_field_is_refused(fields: dict[str, Any], error: type[Exception], what: str, tmp_path: Path) -> None:
    for config in (LowMemTrainingArguments, LowMemSFTConfig):
        with pytest.raises(error, match=what):
            config(str(tmp_path), use_cpu=True, bf16=False, **fields)
    with pytest.raises(error, match=what):
        LowMemPlugin(**fields)


def test_a_model_that_is_too_small_is_refused_as_the_trainer_is_made(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"is below 2048.*lowmem_matmul_least=0"):
        make("Trainer", tmp_path, torch.float32, tokenizer, lowmem_matmul="fp8_row")
