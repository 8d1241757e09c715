"""Plans of streamed steps: beside real ones, and of sequences that no CPU would run."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from hf_lowmem import LowMemDPOConfig
from hf_lowmem.activations.streaming import call
from hf_lowmem.planner import plan
from tests.planner.real import arguments, measure, small_config

# Layers that outweigh the head's tiles of 32,768.
WIDE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 16384,
    "num_hidden_layers": 2,
    "max_position_embeddings": 4096,
}


@pytest.mark.train
@pytest.mark.parametrize(("tiers", "chunk"), [("stream", 256), ("stream_fp8", 200)])
def test_a_streamed_step_is_planned_as_it_is(tiers: str, chunk: int) -> None:
    config = small_config(**WIDE)
    args = arguments(max_length=512, lowmem_activations=tiers, lowmem_stream_chunk=chunk, optim="sgd")
    made, real = plan(config, args, dtype="float32", device="cpu"), measure(config, args, torch.float32)
    assert made.phase == "backward"
    assert abs(made.peak_bytes - real.peak) <= 0.001 * real.peak
    assert abs(made.saved_bytes - real.saved) <= 0.001 * real.saved
    whole = plan(config, arguments(max_length=512, lowmem_activations="checkpoint_fp8", optim="sgd"), dtype="float32")
    assert made.peak_bytes < 0.7 * whole.peak_bytes


@pytest.mark.train
def test_a_streamed_step_of_shared_prompts_is_planned_as_it_is() -> None:
    """With both calls of attention, and no mask."""
    values: dict[str, Any] = {"loss_type": "asft", "lowmem_share_prompt": True, "max_length": 256, "optim": "sgd"}
    config = small_config(**WIDE)
    args = arguments(LowMemDPOConfig, lowmem_activations="stream", lowmem_stream_chunk=128, **values)
    made, real = plan(config, args, dtype="float32", device="cpu"), measure(config, args, torch.float32)
    assert made.phase == "backward"
    assert abs(made.peak_bytes - real.peak) <= 0.001 * real.peak


@pytest.mark.train
def test_shared_prompts_on_a_cuda_device_are_planned_without_a_mask() -> None:
    def peak(shares: bool, tokens: int = 8192) -> int:
        config = LlamaConfig(
            hidden_size=512, intermediate_size=64, num_hidden_layers=1, num_attention_heads=16, vocab_size=128,
            num_key_value_heads=2, max_position_embeddings=tokens,
        )  # fmt: skip
        args = arguments(
            LowMemDPOConfig, loss_type="asft", lowmem_share_prompt=shares, max_length=tokens, optim="sgd",
            lowmem_activations="stream", lowmem_stream_chunk=256,
        )  # fmt: skip
        made = plan(config, args, dtype="bfloat16")
        return max(point.total for point in made.timeline if point.module.startswith("model.layers"))

    # The other answer's keys are not this one's, so gradients of keys for every head are of half of a row.
    unit = 8192 * 512 * 2
    assert peak(True) < peak(False) + 4 * unit  # a mask of tokens x tokens would be 32


@pytest.mark.train
def test_the_chunks_that_are_planned_have_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(max_length=512, lowmem_activations="stream_fp8", lowmem_stream_chunk=64, optim="sgd")
    found = []
    for last in (call.PLANNED, 99):
        monkeypatch.setattr(call, "PLANNED", last)
        found.append(plan(small_config(**WIDE), args, dtype="bfloat16"))
    few, all_of_them = found
    assert few.peak_bytes == all_of_them.peak_bytes
    assert few.parts == all_of_them.parts


@pytest.mark.train
@pytest.mark.parametrize("packing", [False, True])
def test_flash_attention_is_planned_with_what_it_allocates_inside(packing: bool) -> None:
    """Gradients of keys for every head, of which there are 8 times as many as keys; and no mask, of a packed row (by
    the kernel for sequences of several lengths) neither."""

    def peak(keys: int, tokens: int = 4096) -> int:
        config = LlamaConfig(
            hidden_size=512, intermediate_size=64, num_hidden_layers=1, num_attention_heads=16,
            num_key_value_heads=keys, vocab_size=128,
        )  # fmt: skip
        args = arguments(
            max_length=tokens, lowmem_activations="stream", lowmem_stream_chunk=256, optim="sgd", packing=packing
        )
        made = plan(config, args, dtype="bfloat16")
        return max(point.total for point in made.timeline if point.module.startswith("model.layers"))

    unit = 4096 * 512 * 2
    # With as many keys as heads: keys, values and their fp32 gradients are whole, and nothing is expanded.
    shared, own = peak(2), peak(16)
    assert own - shared == pytest.approx((2 + 4 + 2) * unit * 14 / 16 - 2 * unit, rel=0.15)
    assert shared < 16 * unit  # a mask of tokens x tokens alone would be 8 in bytes
