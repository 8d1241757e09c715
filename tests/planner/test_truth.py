"""What is predicted is what a real step takes: part by part, and the peak by the allocator's own trace."""

from typing import Any

import pytest
import torch
from peft import LoraConfig

from hf_lowmem.planner import plan
from hf_lowmem.training import head_blocks
from hf_lowmem.training.dpo import LowMemDPOConfig
from hf_lowmem.training.sft import LowMemSFTTrainer
from tests.planner.real import arguments, measure, small_config

pytestmark = pytest.mark.train

# Of the hooks' count and of the allocator's. The step's own tensors are exact; what is left is what the planner does
# not see (memory that an operator takes and gives back inside) and what the hooks do not (tensors held by closures).
PARTS_WITHIN, PEAK_WITHIN = 0.01, 0.03

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32, plain": ("float32", {}),
    "bf16 weights": ("bfloat16", {"optim": "adamw_torch_fused"}),
    "fp32 weights under bf16 autocast": ("float32", {"bf16": True, "per_device_train_batch_size": 2}),
    "accumulation": ("float32", {"gradient_accumulation_steps": 3}),
    "8-bit states, fp8 activations": (
        "float32",
        {"optim": "adamw", "lowmem_state": "8bit", "lowmem_activations": "fp8", "max_length": 128},
    ),
    "low rank, step in backward": (
        "bfloat16",
        {"optim": "apollo", "lowmem_rank": 16, "lowmem_step_in_backward": True, "max_grad_norm": 0},
    ),
    "gradients added up in int8": (
        "bfloat16",
        {
            "optim": "scale",
            "gradient_accumulation_steps": 3,
            "lowmem_accumulation": "int8_sr",
            "lowmem_step_in_backward": True,
            "max_grad_norm": 0,
        },
    ),
    "a basis in int4, refreshed by its overlap": (
        "bfloat16",
        {"optim": "galore", "lowmem_rank": 64, "lowmem_state": "8bit", "optim_args": "basis=int4,lazy_overlap=0.9"},
    ),
    "weights at rest in int8": (
        "bfloat16",
        {"optim": "adamw", "lowmem_weights": "int8_sr", "lowmem_step_in_backward": True, "max_grad_norm": 0},
    ),
}


# Passes without a backward pass: no gradients, and nothing saved.
FORWARD: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        name: ("bfloat16", {"optim": name, "max_grad_norm": 0})
        for name in ("mezo", "zo_sign", "zo_conservative", "fzoo")
    },
    **{
        name: ("float32", {"optim": name, "max_grad_norm": 0, "lowmem_state": "8bit"})
        for name in ("zo_momentum", "zo_adam", "zo_adamm")
    },
}


# Rules that keep rows, matrices or nothing: in every other file a state has a value for each of a parameter's.
BY_ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: ("bfloat16", {"optim": name, "lowmem_state": "8bit"}) for name in ("scale", "muon", "adam_mini")},
    "sinkgd": ("float32", {"optim": "scale", "optim_args": "sinkhorn_iters=5", "lowmem_embeddings": "adam"}),
    **{
        f"{rule} for embedding and head": (
            "bfloat16",
            {
                "optim": "apollo_mini", "lowmem_state": "8bit", "lowmem_embeddings": rule,
                "lowmem_step_in_backward": True, "max_grad_norm": 0,
            },
        )
        for rule in ("scale", "adam_mini")
    },
}  # fmt: skip


def within(predicted: int, measured: int, tolerance: float) -> bool:
    return abs(predicted - measured) <= tolerance * measured


@pytest.mark.parametrize("name", SETTINGS)
def test_predicted_parts_and_peak_are_those_of_a_real_step(name: str) -> None:
    check(*SETTINGS[name])


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "mezo" else pytest.mark.slow) for n in FORWARD])
def test_a_step_of_forward_passes_is_predicted(name: str) -> None:
    dtype, settings = FORWARD[name]
    args = arguments(**settings)
    predicted = plan(small_config(), args, dtype=dtype, device="cpu")
    real = measure(small_config(), args, getattr(torch, dtype))
    at_update = [point for point in predicted.timeline if point.phase == "optimizer"][-1].parts
    numbers = 2 * 8 * 30  # two whole numbers for each of fewer than 30 parameters, which a plan leaves out
    assert at_update["weights"] == real.weights
    assert "gradients" not in at_update
    assert abs(at_update.get("states", 0) - real.states) <= numbers
    assert (predicted.saved_bytes, real.saved, real.gradients) == (0, 0, 0)
    assert "backward" not in {point.phase for point in predicted.timeline}
    assert within(predicted.peak_bytes, real.peak, PEAK_WITHIN)


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_ROWS)
def test_rules_by_rows_are_predicted_too(name: str) -> None:
    check(*BY_ROWS[name])


def check(dtype: str, settings: dict[str, Any]) -> None:
    args = arguments(**settings)
    predicted = plan(small_config(), args, dtype=dtype, device="cpu")
    real = measure(small_config(), args, getattr(torch, dtype))
    at_update = [point for point in predicted.timeline if point.phase == "optimizer"][-1].parts
    assert at_update["weights"] == real.weights
    assert at_update.get("gradients", 0) == real.gradients
    # A step in backward leaves nothing to the optimizer's own phase; the states are there all the same.
    assert within(at_update["states"], real.states, PARTS_WITHIN)
    assert within(predicted.saved_bytes, real.saved, PARTS_WITHIN)
    assert within(predicted.peak_bytes, real.peak, PEAK_WITHIN)


@pytest.mark.parametrize("stepping", [True, False])
def test_a_head_by_blocks_takes_what_is_predicted(stepping: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a head that outweighs all else, in eight blocks, the peak is the head's, within a hundredth."""
    config = small_config(vocab_size=16384, num_hidden_layers=1)
    monkeypatch.setattr(head_blocks, "BLOCK_BYTES", 2048 * 256 * 4)
    by_rows: dict[str, Any] = {"optim": "lion", "lowmem_step_in_backward": True, "max_grad_norm": 0}
    args = arguments(**(by_rows if stepping else {"optim": "sgd"}))
    predicted = plan(config, args, dtype="bfloat16", device="cpu")
    real = measure(config, args, torch.bfloat16)
    assert within(predicted.peak_bytes, real.peak, 0.01)
    monkeypatch.setattr(LowMemSFTTrainer, "HEAD", None)
    assert plan(config, args, dtype="bfloat16", device="cpu").peak_bytes > predicted.peak_bytes
    assert measure(config, args, torch.bfloat16).peak > real.peak


def test_checkpointing_keeps_the_layers_inputs_and_what_their_closures_hold() -> None:
    args, config = arguments(gradient_checkpointing=True, max_length=128), small_config()
    predicted = plan(config, args, dtype="float32", device="cpu")
    real = measure(config, args, torch.float32)
    assert within(predicted.saved_bytes, real.saved, PARTS_WITHIN)
    assert within(predicted.peak_bytes, real.peak, PEAK_WITHIN)


def test_adapters() -> None:
    args, lora = arguments(), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    predicted = plan(small_config(), args, dtype="bfloat16", device="cpu", peft_config=lora)
    real = measure(small_config(), args, torch.bfloat16, peft_config=lora)
    at_update = [point for point in predicted.timeline if point.phase == "optimizer"][-1].parts
    assert (at_update["weights"], at_update["gradients"]) == (real.weights, real.gradients)
    assert within(at_update["states"], real.states, PARTS_WITHIN)
    assert within(predicted.saved_bytes, real.saved, PARTS_WITHIN)
    assert within(predicted.peak_bytes, real.peak, PEAK_WITHIN)


@pytest.mark.parametrize(("loss", "reference"), [("sigmoid", True), ("asft", False)])
def test_pairs_with_a_reference_model_and_without(loss: str, reference: bool) -> None:
    args = arguments(LowMemDPOConfig, loss_type=loss, max_length=32)
    predicted = plan(small_config(), args, dtype="bfloat16", device="cpu")
    real = measure(small_config(), args, torch.bfloat16, reference=reference)
    at_update = [point for point in predicted.timeline if point.phase == "optimizer"][-1].parts
    assert (at_update["weights"], at_update["gradients"]) == (real.weights, real.gradients)
    assert at_update.get("reference", 0) == (real.weights if reference else 0)
    assert within(predicted.saved_bytes, real.saved, PARTS_WITHIN)
    assert within(predicted.peak_bytes, real.peak, PEAK_WITHIN)
