"""Bytes that a layer keeps, in U = tokens x hidden x 2 bytes: counted by unique storages, on models of true ratios."""

from typing import Any

import pytest
import torch
from torch import nn

from hf_lowmem.activations import convert
from hf_lowmem.memory import measure_saved
from tests.activations.models import build
from tests.activations.test_lora import with_lora

HIDDEN, TOKENS = 512, 512
U = HIDDEN * TOKENS * 2
LLAMA2_7B: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 1376}
LLAMA3_8B: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 1792}


def kept(family: str, tier: str | None, *, lora: Any = False, **shape: Any) -> float:
    """U of the second of two layers: the first may start without gradients."""
    model = build(
        family,
        torch.bfloat16,
        hidden_size=HIDDEN,
        head_dim=64,
        num_hidden_layers=2,
        max_position_embeddings=512,
        **shape,
    )
    model = with_lora(model, dropout=0.05) if lora else model
    if tier:
        convert(model, tier)
    ids = torch.randint(0, 96, (2, TOKENS // 2), generator=torch.Generator().manual_seed(0))
    with measure_saved(model) as saved:
        output = model(input_ids=ids, use_cache=False)
        by_module = saved.by_module_now
    del output
    (layer,) = [
        name for name, module in model.named_modules() if name.endswith("layers.1") and isinstance(module, nn.Module)
    ]
    return sum(n for name, n in by_module.items() if name == layer or name.startswith(f"{layer}.")) / U


@pytest.mark.parametrize(
    ("shape", "tier", "most"),
    [
        (LLAMA2_7B, "exact", 11.6),
        (LLAMA2_7B, "fp8", 6.0),
        (LLAMA2_7B, "fp8_recompute", 3.2),
        (LLAMA2_7B, "checkpoint_fp8", 0.55),
        (LLAMA3_8B, "exact", 11.7),
        (LLAMA3_8B, "fp8", 6.0),
        (LLAMA3_8B, "fp8_recompute", 2.45),
        (LLAMA3_8B, "checkpoint_fp8", 0.55),
    ],
)
def test_llama_shapes(shape: dict[str, int], tier: str, most: float) -> None:
    assert kept("llama", tier, **shape) <= most


def test_the_count_sees_what_huggingface_keeps() -> None:
    """METHODS' figures: 22.8 U of a Llama-2-7B shape. A count that missed tensors would pass every test above."""
    assert kept("llama", None, **LLAMA2_7B) == pytest.approx(22.8, abs=0.1)


def test_qk_norm_costs_one_more_pair_of_q_and_k() -> None:
    plain, normed = (kept(family, "exact", **LLAMA3_8B) for family in ("llama", "qwen3"))
    q_and_k = 1 + 2 / 8
    assert normed - plain <= q_and_k + 0.01  # 0.01: nothing else may come in; the smallest tensor would, 1/64 U


def test_lora_on_every_linear_with_dropout() -> None:
    assert kept("llama", "exact", lora=True, **LLAMA2_7B) <= 11.8
    assert kept("llama", None, lora=True, **LLAMA2_7B) > 30


@pytest.mark.parametrize("tier", ["exact", "fp8"])
def test_fused_projections_keep_no_more(tier: str) -> None:
    """Phi-3 saves its value heads as a third of q, k, v in one, whose other thirds nobody needs."""
    assert kept("phi3", tier, **LLAMA2_7B) <= kept("llama", tier, **LLAMA2_7B) + 0.01


def test_hooks_keep_less_than_huggingface_without_knowing_the_model() -> None:
    assert kept("llama", "hooks_fp8", **LLAMA2_7B) < 0.65 * kept("llama", None, **LLAMA2_7B)
