"""LoRA on a model of which `lowmem_matmul` keeps codes alone: trained as with weights, resumed, evaluated, saved."""

import copy
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer

from hf_lowmem import LowMemDPOConfig, LowMemDPOTrainer
from hf_lowmem.memory import parameter_bytes
from hf_lowmem.preference.reference.identity import digest_of, identity_of
from hf_lowmem.training import multiplying
from hf_lowmem.training.plugin import LowMemPlugin
from hf_lowmem.weights import at_rest, wake
from tests.conftest import tiny_llama
from tests.training.test_resume import TRAINERS
from tests.training.test_trainers import pair_data, token_data

pytestmark = pytest.mark.train

EIGHT: dict[str, Any] = {"lowmem_matmul": "fp8_row", "lowmem_matmul_least": 0, "optim": "adamw"}


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")


def make(kind: str, folder: Path, tokenizer: Any, **fields: Any) -> Any:
    trainer_class, config = TRAINERS[kind]
    settings: dict[str, Any] = {
        "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "max_steps": 6, "save_steps": 3,
        "logging_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 5e-3, "warmup_steps": 2,
        "gradient_checkpointing": False,
    }  # fmt: skip
    args = config(str(folder), **settings | EIGHT | fields)
    torch.manual_seed(0)
    model: Any = tiny_llama(dtype=torch.bfloat16, num_hidden_layers=2)
    data = pair_data(16) if kind == "DPOTrainer" else token_data(16)
    extra: dict[str, Any] = {"processing_class": tokenizer, "peft_config": lora()}
    if kind == "Trainer":
        model, extra = get_peft_model(model, lora()), {}
    return trainer_class(model, args=args, train_dataset=data, eval_dataset=data, **extra)


def adapters(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


CASES = [
    ("Trainer", {"lowmem_activations": "checkpoint_fp8"}),
    ("SFTTrainer", {"lowmem_activations": "fp8", "lowmem_matmul": "int8_row"}),
    ("DPOTrainer", {"loss_type": "sigmoid"}),
    ("DPOTrainer", {"loss_type": "sigmoid", "lowmem_reference": "precomputed"}),
]


@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_trained_as_with_weights_and_resumed_to_the_bit(
    kind: str, fields: dict[str, Any], tmp_path: Path, tokenizer: Any
) -> None:
    """The loss with a reference, which is evaluated with the base, is that of the base as it is decoded."""
    whole = make(kind, tmp_path / "whole", tokenizer, **fields)
    before = parameter_bytes(whole.model)
    whole.train()
    assert sum(at_rest(p) is not None for p in whole.model.parameters()) == 14
    assert parameter_bytes(whole.model) < before
    assert "codes alone: 14 frozen weights" in str(whole.products)
    again = make(kind, tmp_path / "again", tokenizer, **fields)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert equal(adapters(whole.model), adapters(again.model))
    if kind != "DPOTrainer":
        with mock.patch.object(multiplying, "whole_under", return_value="for comparison"):
            kept = make(kind, tmp_path / "kept", tokenizer, **fields)
            kept.train()
        assert sum(at_rest(p) is not None for p in kept.model.parameters()) == 0
        assert equal(adapters(whole.model), adapters(kept.model))
    else:
        assert losses(whole)[0] == pytest.approx(0.6931, abs=0.02)  # products of 8 bits beside plain ones


def test_evaluated_the_best_had_back_saved_and_merged_into_the_model_as_it_was(tmp_path: Path, tokenizer: Any) -> None:
    trainer = make(
        "SFTTrainer", tmp_path, tokenizer, eval_strategy="steps", eval_steps=1, save_steps=1, max_steps=3,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", learning_rate=0.3,
    )  # fmt: skip
    trainer.train()
    found = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(found.values()), abs=1e-6)
    trainer.save_model(str(tmp_path / "end"))
    torch.manual_seed(0)
    base = tiny_llama(dtype=torch.bfloat16, num_hidden_layers=2)
    weight = base.model.layers[0].mlp.up_proj.weight.detach().clone()
    loaded = PeftModel.from_pretrained(base, tmp_path / "end")
    assert equal(adapters(loaded), adapters(trainer.model))
    assert torch.equal(loaded.merge_and_unload().model.layers[0].mlp.up_proj.weight, weight)  # as it was: no adapter
    ids = torch.tensor([[3, 4, 5]])
    cast(Any, trainer.model).generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    # A second training of the same model goes on from its codes, one without products from what they decode to.
    trainer.train()
    trainer.args.lowmem_matmul = trainer.args.lowmem_matmul_least = None
    trainer.train()
    with pytest.raises(RuntimeError, match=r"codes alone.*weights\.wake\(model\)"):
        copy.copy(trainer.model).merge_and_unload()
    cast(Any, wake(trainer.model)).merge_and_unload()


def test_a_table_of_a_reference_is_not_that_of_another_base(tmp_path: Path, tokenizer: Any) -> None:
    """Precomputed log-probabilities are of the base that is there: with and without its weights they are two tables."""
    identities = set()
    fields: list[dict[str, Any]] = [{}, {"lowmem_matmul": None, "lowmem_matmul_least": None}]
    for matmul in fields:
        args = LowMemDPOConfig(
            str(tmp_path), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=1,
            per_device_train_batch_size=2, gradient_checkpointing=False, lowmem_reference="precomputed",
            **EIGHT | matmul,
        )  # fmt: skip
        trainer = LowMemDPOTrainer(
            tiny_llama(), args=args, train_dataset=pair_data(4), processing_class=tokenizer, peft_config=lora()
        )
        identities.add(identity_of(trainer, digest_of(trainer.model), None))
    assert len(identities) == 2


def test_a_loop_of_ones_own_saves_its_state(tmp_path: Path) -> None:
    plugin = LowMemPlugin(learning_rate=1e-2, **EIGHT)
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model, optimizer = plugin.prepare(accelerator, get_peft_model(tiny_llama().train(), lora()))

    def step() -> float:
        ids = torch.arange(64).view(2, 32)
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    step()
    accelerator.save_state(str(tmp_path))
    want = step()
    step()
    accelerator.load_state(str(tmp_path))
    assert step() == want
    plugin.remove()


def test_codes_are_made_before_a_device_has_the_weights(tmp_path: Path, tokenizer: Any) -> None:
    seen: list[int] = []
    with mock.patch.object(Trainer, "_move_model_to_device", lambda self, model, device: seen.append(_coded(model))):
        trainer = make("Trainer", tmp_path, tokenizer)
        assert seen.pop() == 0  # it is there already
        trainer._move_model_to_device(trainer.model, torch.device("meta"))
        assert seen == [14]


def _coded(model: Any) -> int:
    return sum(at_rest(p) is not None for p in model.parameters())


def test_methods_of_zeroth_order_perturb_adapters_on_codes(tmp_path: Path, tokenizer: Any) -> None:
    trainer = make("SFTTrainer", tmp_path, tokenizer, optim="mezo", max_grad_norm=0, max_steps=2)
    start = adapters(trainer.model)
    trainer.train()
    assert _coded(trainer.model) == 14
    assert not equal(start, adapters(trainer.model))
