"""What a plan says of models whose bytes can be worked out by hand."""

import copy
import os
import random
from typing import Any

import numpy
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from transformers import LlamaConfig

from hf_lowmem.planner import Plan, plan
from hf_lowmem.planner.simulate import CUDA_CONTEXT
from tests.planner.real import arguments, small_config

pytestmark = pytest.mark.train

HIDDEN, FFN, VOCABULARY, LAYERS = 4096, 14336, 128256, 32
LLAMA_3_8B = LlamaConfig(
    hidden_size=HIDDEN,
    intermediate_size=FFN,
    num_hidden_layers=LAYERS,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=VOCABULARY,
    max_position_embeddings=8192,
)
PARAMETERS = 8_030_261_248
A_LAYER = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * 1024 + 3 * HIDDEN * FFN + 2 * HIDDEN
TINY = 64 * 1024  # rotary frequencies, step counts, norms' temporaries, the loss


def eight_billion(implementation: str, layers: int) -> Plan:
    config = copy.deepcopy(LLAMA_3_8B)
    config.num_hidden_layers = layers
    args = arguments(optim="adamw_torch", max_length=2048, gradient_checkpointing=True, bf16=True)
    return plan(config, args, dtype="bfloat16", implementation=implementation)


@pytest.mark.parametrize(
    ("implementation", "layers"),
    [
        ("for-loop", 4),
        ("fused", 4),
        ("foreach", LAYERS),
        pytest.param("for-loop", LAYERS, marks=pytest.mark.slow),
        pytest.param("fused", LAYERS, marks=pytest.mark.slow),
    ],
)
def test_llama_3_8b_with_adamw_in_pure_bf16(implementation: str, layers: int) -> None:
    """All of its layers, or the first few of them, which are simulated in full."""
    made = eight_billion(implementation, layers)
    parameters = PARAMETERS - (LAYERS - layers) * A_LAYER
    assert made.settings["parameters"] == made.settings["trained"] == parameters
    assert abs(made.parts["weights"] - 2 * parameters) < TINY
    assert abs(made.parts["gradients"] - 2 * parameters) < TINY
    assert abs(made.parts["states"] - 4 * parameters) < TINY
    temporaries = {
        # sqrt(v) and the denominator of the embedding, beside the denominator of the parameter before it.
        "for-loop": 2 * 2 * VOCABULARY * HIDDEN + 2 * FFN * HIDDEN,
        # sqrt(v) of all parameters that decay at once; the norms, two a layer and the last, are another group.
        "foreach": 2 * (parameters - (2 * layers + 1) * HIDDEN),
    }
    if implementation in temporaries:
        assert made.phase == "optimizer"
        assert abs(made.parts["temporaries"] - temporaries[implementation]) < TINY
    else:  # nothing is added by the update, so the end of backward is the peak: the embedding's incoming gradient
        assert made.phase == "backward"
        assert made.parts["temporaries"] < 2 * 2048 * HIDDEN + TINY
    assert made.peak_bytes == sum(made.parts.values())
    assert made.peak_bytes <= made.reserved_bytes - CUDA_CONTEXT < made.peak_bytes * 1.001


def states() -> tuple[Any, ...]:
    """Of every global random stream."""
    return random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002


def test_nothing_is_left_behind() -> None:
    args = arguments()
    transformers.set_seed(3)
    before = states()
    dtype, shared, folder = torch.get_default_dtype(), dict(AcceleratorState._shared_state), args.output_dir
    values = dict(vars(args))
    plan(small_config(), args, dtype="bfloat16")
    assert states() == before
    assert torch.get_default_dtype() is dtype
    assert dict(AcceleratorState._shared_state) == shared
    assert os.listdir(folder) == []
    assert vars(args) == values
    assert torch.nn.Linear(2, 2).to(torch.bfloat16).weight.tolist()  # real tensors, cast as ever


@pytest.mark.parametrize(
    ("setting", "smaller"),
    [
        ({"max_length": 96}, {"max_length": 48}),
        ({"gradient_checkpointing": False, "max_length": 128}, {"gradient_checkpointing": True, "max_length": 128}),
        ({"max_length": 128}, {"lowmem_activations": "exact", "max_length": 128}),
        ({"optim": "adamw"}, {"optim": "adamw", "lowmem_state": "8bit"}),
        ({"optim": "adamw_torch_fused"}, {"optim": "adamw_8bit"}),
    ],
)
def test_what_saves_memory_is_predicted_to(setting: dict[str, Any], smaller: dict[str, Any]) -> None:
    config = small_config(num_hidden_layers=2)
    full, less = (plan(config, arguments(**s), dtype="bfloat16") for s in (setting, smaller))
    part = "states" if "optim" in setting else "activations"
    held = [
        [point.parts.get(part, 0) for point in made.timeline if point.phase == "end of forward"][-1]
        for made in (full, less)
    ]
    assert held[0] > 1.3 * held[1] > 0
    assert full.peak_bytes > less.peak_bytes


def test_micro_batches_that_are_fetched_ahead_are_inputs() -> None:
    config = small_config(num_hidden_layers=2)
    two, nine = (plan(config, arguments(gradient_accumulation_steps=n), dtype="bfloat16") for n in (2, 9))
    batch = 3 * 48 * 8  # ids, labels and mask of 48 tokens
    inputs = [
        [point.parts["inputs"] for point in made.timeline if point.phase == "forward"][-1] for made in (two, nine)
    ]
    assert inputs == [2 * batch, 9 * batch]


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"dtype": "float8"}, ValueError, "dtype='float8' is not available"),
        ({"device": "tpu"}, ValueError, "device='tpu'"),
        ({"world_size": 4}, ValueError, "world_size=4 with parallel=None"),
        ({"parallel": "tensor", "world_size": 2}, ValueError, "parallel='tensor'"),
        ({"args": None}, TypeError, "expected LowMemSFTConfig or LowMemDPOConfig"),
        ({"model": "no/such-model"}, ValueError, "no hub id in the local cache"),
    ],
)
def test_bad_questions_are_named(more: dict[str, Any], error: type[Exception], message: str) -> None:
    asked: dict[str, Any] = {"model": small_config(num_hidden_layers=1), "args": arguments()} | more
    with pytest.raises(error, match=message):
        plan(asked.pop("model"), asked.pop("args"), **asked)
