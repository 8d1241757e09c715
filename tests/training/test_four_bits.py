"""4-bit layers of bitsandbytes on a CPU: an evaluation between two steps leaves the second one's gradients alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_lowmem import LowMemSFTConfig, LowMemSFTTrainer
from hf_lowmem.training.four_bits import keep_backward
from tests.conftest import tiny_llama
from tests.training.test_trainers import settings, token_data

dequantize_4bit = pytest.importorskip("bitsandbytes.functional").dequantize_4bit


def quantised(folder: Path) -> Any:
    tiny_llama(num_hidden_layers=2, intermediate_size=128).save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


@pytest.mark.train
def test_an_evaluation_between_two_steps_changes_nothing(tmp_path: Path, tokenizer: Any) -> None:
    """On a CPU that has no layout of its own, this is so anyway."""
    runs = []
    for evaluates in (False, True):
        args = settings(
            LowMemSFTConfig, tmp_path, max_steps=3, optim="adamw", eval_strategy="steps" if evaluates else "no",
            eval_steps=1, learning_rate=1e-2,
        )  # fmt: skip
        trainer = LowMemSFTTrainer(
            quantised(tmp_path / "model"), args=args, train_dataset=token_data(), eval_dataset=token_data(4),
            processing_class=tokenizer, peft_config=LoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
        )  # fmt: skip
        trainer.train()
        runs.append({n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad})
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert all(p.any() for p in runs[0].values())


def test_a_model_that_was_evaluated_before_has_its_backward_pass_again(tmp_path: Path) -> None:
    """Its weights are what bitsandbytes has made of them: scales in bf16."""
    model = quantised(tmp_path / "model")
    with torch.no_grad():
        model.eval()(torch.arange(3, 19)[None])
    keep_backward(model.train())
    for layer in model.model.layers:
        x = torch.randn(5, 64, requires_grad=True)
        y = layer.mlp.gate_proj(x)
        weight = dequantize_4bit(layer.mlp.gate_proj.weight.data, layer.mlp.gate_proj.weight.quant_state).float()
        torch.testing.assert_close(y, x @ weight.T, atol=1e-5, rtol=1e-5)
        (grad,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(grad, weight.sum(0).expand_as(x), atol=1e-5, rtol=1e-5)
