"""Weights of streamed layers: their hooks, and those that bitsandbytes has in four bits."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_lowmem.activations import convert
from hf_lowmem.specs import ActivationSpec
from tests.activations.models import batch, build


@pytest.mark.parametrize("chunk", [7, None])
def test_hooks_of_a_weight_see_its_gradient_once_and_whole(chunk: int | None) -> None:
    found = []
    for tier in (None, ActivationSpec(tiers="stream", chunk=chunk)):
        model = build("llama")
        if tier is not None:
            convert(model, tier)
        weight, norms = model.model.layers[0].mlp.up_proj.weight, []

        def doubled(grad: Tensor, norms: list[Tensor] = norms) -> Tensor:
            norms.append(grad.norm())
            return 2 * grad

        weight.register_hook(doubled)
        model(**batch()).loss.backward()
        assert len(norms) == 1
        assert model.model.layers[0].mlp.up_proj.weight is weight
        found.append((norms[0], weight.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("tier", ["checkpoint_fp8", "stream"])
def test_norms_beside_four_bit_weights_get_their_gradients(tier: str, tmp_path: Path) -> None:
    """In evaluation bitsandbytes packs its weights anew on some CPUs, for products that have no backward pass."""
    build("llama", hidden_size=128, intermediate_size=256).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    found = []
    for converted in (None, ActivationSpec(tiers=tier)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings).train()
        for name, p in model.named_parameters():
            p.requires_grad_("norm" in name)
        if converted is not None:
            convert(model, converted)
        model(**batch()).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(grad is not None for grad in found[1].values())
    for name, grad in found[0].items():
        assert (found[1][name] - grad).norm() <= (1e-4 if tier == "stream" else 0.1) * grad.norm(), name


def test_adapters_on_four_bit_weights_get_their_gradients(tmp_path: Path) -> None:
    build("llama", hidden_size=128, intermediate_size=256).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    found = []
    for converted in (None, ActivationSpec(tiers="stream", chunk=7)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()
        if converted is not None:
            convert(adapted, converted)
        loss = adapted(**batch()).loss
        loss.backward()
        found.append((loss, {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}))
    (loss, grads), (ours, again) = found
    torch.testing.assert_close(ours, loss, rtol=1e-6, atol=0)
    assert len(grads) == 2 * 2 * 7
    for name, grad in grads.items():
        assert grad is not None
        torch.testing.assert_close(again[name], grad, rtol=0, atol=1e-5 * float(grad.abs().max()))
