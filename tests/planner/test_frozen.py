"""A frozen model that is kept as codes of 8-bit products, planned: a byte a weight, of shallow models and deep."""

from typing import Any

import pytest
import torch
from peft import LoraConfig

from hf_lowmem.planner import plan
from tests.planner.real import arguments, measure, small_config

EIGHT: dict[str, Any] = {"lowmem_matmul": "fp8_row", "lowmem_matmul_least": 0, "gradient_checkpointing": False}
BF16 = torch.bfloat16


def lora() -> LoraConfig:
    return LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.mark.train
@pytest.mark.parametrize("recipe", ["fp8_row", "int8_row"])
def test_a_plan_is_that_of_a_real_run(recipe: str) -> None:
    config, args = small_config(num_hidden_layers=2), arguments(**EIGHT | {"lowmem_matmul": recipe, "max_length": 96})
    made = plan(config, args, dtype=BF16, device="cpu", peft_config=lora())
    real = measure(config, args, BF16, peft_config=lora())
    assert [p.parts for p in made.timeline if p.phase == "optimizer"][-1]["weights"] == real.weights
    assert abs(made.peak_bytes - real.peak) <= 0.01 * real.peak
    whole = plan(
        config, arguments(gradient_checkpointing=False, max_length=96), dtype=BF16, device="cpu", peft_config=lora()
    )
    assert config.num_key_value_heads is not None
    assert config.head_dim is not None
    keys = config.num_key_value_heads * config.head_dim
    linears = 2 * config.hidden_size * (2 * config.hidden_size + 2 * keys + 3 * config.intermediate_size)
    saved = whole.parts["weights"] - made.parts["weights"]
    assert 0.9 * linears < saved <= linears  # a byte of two, but for a scale a row


@pytest.mark.slow
def test_of_a_deep_model_to_the_byte_and_of_shards_as_weights() -> None:
    config, args = small_config(hidden_size=64, intermediate_size=96, num_hidden_layers=8), arguments(**EIGHT)
    made = plan(config, args, dtype="bfloat16", peft_config=lora())
    full = plan(config, args, dtype="bfloat16", peft_config=lora(), extrapolate_depth=False)
    assert max(made.depths) < full.depths[0] == 8
    assert made.timeline == full.timeline
    plain = arguments(gradient_checkpointing=False)
    for parallel, same in (("ddp", False), ("fsdp2", True)):
        eight, sixteen = (
            plan(config, a, dtype="bfloat16", peft_config=lora(), world_size=2, parallel=parallel).parts["weights"]
            for a in (args, plain)
        )
        assert (eight == sixteen) == same
