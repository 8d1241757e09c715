"""A deep model's step from shallow ones': to the byte where layers are alike, refused where they are not."""

from typing import Any

import numpy as np
import pytest
from peft import LoraConfig
from transformers import Gemma3TextConfig

from hf_lowmem.planner import plan
from hf_lowmem.planner.models import period_of, with_depth
from hf_lowmem.planner.moments import Moment, NotLinear, extrapolate
from hf_lowmem.planner.parts import PARTS
from tests.planner.real import arguments, small_config

DEEP = 8


def narrow(**overrides: Any) -> Any:
    return small_config(**{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": DEEP} | overrides)


def gemma() -> Gemma3TextConfig:
    """Layers in pairs: one with a sliding window, one without."""
    return Gemma3TextConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=15,
        layer_types=[*["sliding_attention", "full_attention"] * 7, "sliding_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=512,
        max_position_embeddings=64,
        sliding_window=16,
    )


CASES: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "checkpointing, accumulation": (narrow(), {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}, None),
    "fp8 activations, step in backward": (
        narrow(),
        {"optim": "lion", "lowmem_activations": "fp8", "lowmem_step_in_backward": True, "max_grad_norm": 0},
        None,
    ),
    "adapters": (narrow(), {}, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")),
    "layers of two kinds": (gemma(), {}, None),
}


@pytest.mark.train
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n != "layers of two kinds" else n for n in CASES]
)
def test_every_moment_of_a_deep_model_is_predicted_to_the_byte(name: str) -> None:
    config, settings, lora = CASES[name]
    made = plan(config, arguments(**settings), dtype="bfloat16", peft_config=lora)
    full = plan(config, arguments(**settings), dtype="bfloat16", peft_config=lora, extrapolate_depth=False)
    assert len(made.depths) == 3
    assert max(made.depths) < config.num_hidden_layers == full.depths[0]
    assert made.timeline == full.timeline
    assert (made.peak_bytes, made.reserved_bytes) == (full.peak_bytes, full.reserved_bytes)


@pytest.mark.train
def test_tiers_by_layer_are_simulated_in_full() -> None:
    args = arguments(lowmem_activations="fp8:0-3,checkpoint_fp8:4-")
    assert plan(narrow(), args, dtype="bfloat16").depths == (DEEP,)


@pytest.mark.train
def test_layers_that_are_larger_further_up_are_simulated_in_full() -> None:
    config = with_depth(gemma(), DEEP)
    config.layer_types = ["sliding_attention"] * 4 + ["full_attention"] * 4
    assert period_of(config) == DEEP
    assert plan(config, arguments(), dtype="bfloat16").depths == (DEEP,)


def test_a_shallower_config_has_the_first_layers() -> None:
    assert with_depth(gemma(), 3).layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert (period_of(gemma()), period_of(narrow())) == (2, 1)


def moments(depth: int, last: int) -> list[Moment]:
    """Each layer's forward leaves ten bytes; `last` come on top in the last one."""
    made = []
    for layer in range(depth):
        values = np.zeros(len(PARTS) + 1, dtype=np.int64)
        values[0] = 10 * layer + (last if layer == depth - 1 else 0)
        made.append(Moment(0, "forward", layer, "", False, values))
    return made


def test_extrapolation_follows_the_line_and_refuses_what_leaves_it() -> None:
    found = extrapolate({d: moments(d, last=3) for d in (5, 6, 7)}, 40)
    assert [(m.layer, m.total) for m in found] == [(i, 10 * i + 3 * (i == 39)) for i in range(40)]
    with pytest.raises(NotLinear, match="in forward, last 0"):
        extrapolate({5: moments(5, 3), 6: moments(6, 3), 7: moments(7, 4)}, 40)
    bent = moments(7, 3)
    bent[3].values[0] += 1
    with pytest.raises(NotLinear, match="layer 3"):
        extrapolate({5: moments(5, 3), 6: moments(6, 3), 7: bent}, 40)
