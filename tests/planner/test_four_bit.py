"""QLoRA: 4-bit base weights under adapters, predicted as bitsandbytes holds them in a real step."""

from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig, GPT2Config

from hf_lowmem.planner import plan
from hf_lowmem.planner.models import meta_model
from tests.planner.real import arguments, measure, small_config

PARTS_WITHIN, PEAK_WITHIN = 0.01, 0.03  # as in test_truth.py
# One layer's dequantised weight is more than its few tokens take. Nothing else is as wide as the vocabulary.
WIDE = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 384}


def four_bits(dtype: torch.dtype, kind: str = "nf4", nested: bool = True) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested, bnb_4bit_compute_dtype=dtype
    )


def lora() -> LoraConfig:
    return LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")


def within(predicted: int, measured: int, tolerance: float) -> bool:
    return abs(predicted - measured) <= tolerance * measured


@pytest.mark.train
@pytest.mark.parametrize(
    ("shape", "dtype", "settings", "kind", "nested"),
    [
        pytest.param(WIDE, torch.bfloat16, {"max_length": 8}, "nf4", True, id="a dequantised weight is the peak"),
        pytest.param({}, torch.float32, {"bf16": True}, "fp4", False, id="fp32 under autocast", marks=pytest.mark.slow),
        pytest.param(
            {},
            torch.bfloat16,
            {"gradient_checkpointing": True, "max_length": 128},
            "nf4",
            True,
            id="checkpointing",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {},
            torch.bfloat16,
            {"lowmem_activations": "exact", "max_length": 128},
            "nf4",
            True,
            id="exact",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_predicted_parts_and_peak_are_those_of_a_real_step(
    shape: dict[str, int], dtype: torch.dtype, settings: dict[str, Any], kind: str, nested: bool
) -> None:
    config, args, base = small_config(**shape), arguments(**settings), four_bits(dtype, kind, nested)
    predicted = plan(config, args, dtype=dtype, device="cpu", peft_config=lora(), quantization_config=base)
    real = measure(config, args, dtype, peft_config=lora(), quantization=base)
    at_update = [point for point in predicted.timeline if point.phase == "optimizer"][-1].parts
    assert (at_update["weights"], at_update["gradients"]) == (real.weights, real.gradients)
    assert within(at_update["states"], real.states, PARTS_WITHIN)
    assert within(predicted.saved_bytes, real.saved, PARTS_WITHIN)
    assert within(predicted.peak_bytes, real.peak, PEAK_WITHIN)
    if shape is WIDE:
        assert predicted.parts["temporaries"] > WIDE["hidden_size"] * WIDE["intermediate_size"] * dtype.itemsize


@pytest.mark.slow
def test_a_deep_model_is_predicted_from_shallow_ones_to_the_byte() -> None:
    config = small_config(hidden_size=64, intermediate_size=96, num_hidden_layers=8)
    options: dict[str, Any] = {"peft_config": lora(), "quantization_config": four_bits(torch.bfloat16)}
    made = plan(config, arguments(), dtype="bfloat16", **options)
    full = plan(config, arguments(), dtype="bfloat16", extrapolate_depth=False, **options)
    assert max(made.depths) < full.depths[0] == 8
    assert made.timeline == full.timeline
    # As many as without quantisation: a 4-bit weight counts its values, not its bytes.
    assert made.settings["parameters"] - made.settings["trained"] == 2 * 512 * 64 + 64 + 8 * (43_008 - 12_288 + 128)


@pytest.mark.train
def test_a_model_whose_config_names_four_bits_is_planned_in_four_bits() -> None:
    config = small_config(num_hidden_layers=1)
    given = plan(
        config, arguments(), dtype="bfloat16", peft_config=lora(), quantization_config=four_bits(torch.bfloat16)
    )
    config.quantization_config = four_bits(torch.bfloat16).to_dict()
    named = plan(config, arguments(), dtype="bfloat16", peft_config=lora())
    assert named.timeline == given.timeline
    assert config.quantization_config == four_bits(torch.bfloat16).to_dict()


def test_transposed_weights_are_quantised_and_heads_are_not() -> None:
    config = GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=512, n_positions=64)
    model = meta_model(config, torch.bfloat16, None, four_bits(torch.bfloat16, nested=False))
    packed = model.transformer.h[0].attn.c_attn.weight
    assert packed.quant_state.shape == (3 * 64, 64)
    assert packed.untyped_storage().nbytes() == 3 * 64 * 64 // 2
    assert packed.quant_state.absmax.numel() == 3 * 64 * 64 // 64
    assert model.lm_head.weight.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("quantization", "peft_config", "more", "message"),
    [
        (BitsAndBytesConfig(load_in_8bit=True), lora(), {}, "bitsandbytes' 8 bits"),
        ({"quant_method": "gptq", "bits": 4}, lora(), {}, "'gptq'"),
        (four_bits(torch.bfloat16), None, {}, "Set peft_config"),
        (four_bits(torch.bfloat16), lora(), {"world_size": 2, "parallel": "fsdp2"}, "scales are not sharded"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    quantization: Any, peft_config: Any, more: dict[str, Any], message: str
) -> None:
    config = small_config(num_hidden_layers=1)
    config.quantization_config = quantization
    with pytest.raises(ValueError, match=message):
        plan(config, arguments(), dtype="bfloat16", peft_config=peft_config, **more)
