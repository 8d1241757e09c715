"""Adapters: one kept input for all of them, dropout from the generator's state and not from its masks."""

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from hf_lowmem.activations import convert, measure
from tests.activations.models import batch, build, loss_and_gradients

WIDE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
}


def with_lora(
    model: nn.Module,
    dropout: float = 0.05,
    adapters_in_fp32: bool = False,
    target_modules: str | list[str] = "all-linear",
) -> Any:
    """LoRA on all linears; B is not zero, or A would get no gradient."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules=target_modules)
    adapted: Any = get_peft_model(model, config, autocast_adapter_dtype=adapters_in_fp32)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_().mul_(0.1)
    return adapted.train()


def in_four_bits(model: Any) -> Any:
    """The decoder's linears as bitsandbytes' NF4, as a model loaded with `load_in_4bit` has them."""
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if isinstance(linear, nn.Linear):
                    four: Any = bnb.nn.Linear4bit(
                        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16
                    )
                    weight: Any = bnb.nn.Params4bit
                    four.weight = weight(linear.weight.data, requires_grad=False, quant_type="nf4")
                    setattr(block, name, four.to("cpu"))
    return model


@pytest.mark.parametrize("adapters_in_fp32", [False, True])
@pytest.mark.parametrize("quantised", [False, True])
def test_lora_and_qlora_are_equal_and_keep_a_third(quantised: bool, adapters_in_fp32: bool) -> None:
    base = build("llama", torch.bfloat16, num_hidden_layers=2, **WIDE)
    model = with_lora(in_four_bits(base) if quantised else base, adapters_in_fp32=adapters_in_fp32)
    inputs = batch(tokens=64)
    loss, gradients = loss_and_gradients(model, inputs)
    convert(model, "exact")
    ours, our_gradients = loss_and_gradients(model, inputs)
    assert torch.equal(loss, ours)
    assert len(gradients) == 2 * 7 * 2
    assert all(torch.equal(g, our_gradients[name]) for name, g in gradients.items())
    before, after = [*measure(model, lambda: model(**inputs), 128).layers.values()][1]
    # 7 generator states of 5 KB are 1.1 U here, at 128 tokens of 128 values; adapters' insides 7 x 8/128 U.
    assert after < 0.42 * before


@pytest.mark.parametrize("tier", ["fp8", "fp8_recompute", "checkpoint_fp8"])
def test_lossy_tiers_leave_the_loss_alone(tier: str) -> None:
    model = with_lora(build("llama", torch.bfloat16, **WIDE))
    inputs = batch(tokens=32)
    loss, gradients = loss_and_gradients(model, inputs)
    convert(model, tier)
    ours, our_gradients = loss_and_gradients(model, inputs)
    assert torch.equal(loss, ours)
    assert gradients.keys() == our_gradients.keys()


def test_one_adapter_among_frozen_projections() -> None:
    model = with_lora(build("llama", **WIDE), target_modules=["q_proj", "v_proj"])
    inputs = batch()
    loss, gradients = loss_and_gradients(model, inputs)
    report = convert(model, "exact")
    ours, our_gradients = loss_and_gradients(model, inputs)
    assert torch.equal(loss, ours)
    assert all(torch.equal(g, our_gradients[name]) for name, g in gradients.items())
    assert report.layers[0].handled["recomputed (norms, activations, dropouts)"] == 5


def test_names_of_adapters_stay() -> None:
    model = with_lora(build("llama"))
    before = list(model.state_dict())
    convert(model, "fp8")
    assert list(model.state_dict()) == before
