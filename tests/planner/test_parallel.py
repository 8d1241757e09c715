"""The formulas for several processes, on models whose shards can be counted by hand."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_lowmem.planner import plan
from hf_lowmem.planner.models import Shape
from hf_lowmem.planner.moments import Moment
from hf_lowmem.planner.parallel import spread
from hf_lowmem.planner.parts import PARTS
from hf_lowmem.weights.int8 import group_of
from tests.planner.real import arguments, small_config

# An embedding that four processes cut unevenly (10 rows: 3, 3, 3, 1), and two layers of 64 values; bf16.
SHAPES = [Shape(None, (10, 8), 2, True), Shape(0, (8, 8), 2, True), Shape(1, (8, 8), 2, True)]
WHOLE = 2 * (80 + 64 + 64)
SHARDS = 3 * 8 + 2 * 8 + 2 * 8  # values


def moment(phase: str, layer: int | None, before: bool = False, **parts: int) -> Moment:
    values = np.zeros(len(PARTS) + 1, dtype=np.int64)
    for name, size in {"weights": WHOLE, **parts}.items():
        values[PARTS.index(name)] = size
    return Moment(1, phase, layer, "", before, values)


def fsdp2(*moments: Moment, mixed: bool = False, accumulates: bool = False) -> list[dict[str, int]]:
    made = spread(moments, SHAPES, world=4, parallel="fsdp2", mixed=mixed, accumulates=accumulates)
    return [m.parts() for m in made]


@pytest.mark.train
def test_ddp_holds_the_gradients_twice() -> None:
    config = small_config(num_hidden_layers=2)
    one = plan(config, arguments(), dtype="bfloat16")
    two = plan(config, arguments(), dtype="bfloat16", world_size=2, parallel="ddp")
    assert two.parts == {**one.parts, "communication": 2 * one.settings["parameters"]}


@pytest.mark.parametrize(("mixed", "itemsize"), [(False, 2), (True, 4)])
def test_fsdp2_at_the_update_holds_shards_alone(mixed: bool, itemsize: int) -> None:
    update = moment("optimizer", None, gradients=WHOLE, states=2 * WHOLE, temporaries=WHOLE)
    size = SHARDS * itemsize
    assert fsdp2(update, mixed=mixed) == [
        {"weights": size, "gradients": size, "states": 2 * size, "temporaries": size},
    ]


def test_a_span_of_an_update_is_as_large_in_a_shard() -> None:
    update = moment("optimizer", None, temporaries=WHOLE)
    (made,) = spread([update], SHAPES, world=4, parallel="fsdp2", mixed=False, accumulates=False, spans=True)
    assert made.parts() == {"weights": 2 * SHARDS, "temporaries": WHOLE}


@pytest.mark.train
def test_zeroth_order_is_planned_under_fsdp2() -> None:
    """Where weights alone are kept; of states an update takes whole shards, which one process's plan does not say."""
    config, two = small_config(num_hidden_layers=2), {"world_size": 2, "parallel": "fsdp2", "dtype": "bfloat16"}
    args = {"optim": "mezo", "max_grad_norm": 0.0, "gradient_checkpointing": False}
    one, cut = plan(config, arguments(**args), dtype="bfloat16"), plan(config, arguments(**args), **two)
    assert 0.5 <= cut.parts["weights"] / one.parts["weights"] < 0.52
    assert "gradients" not in cut.parts
    for more in ({"optim": "zo_adam"}, {"lowmem_weights": "bf16_ecc"}):
        with pytest.raises(ValueError, match="takes a shard whole"):
            plan(config, arguments(**args | more), **two)
    with pytest.raises(ValueError, match="each moves another block"):
        plan(config, arguments(**args, optim_args="block_layers=1"), dtype="bfloat16")


def test_fsdp2_gathers_the_layer_the_next_one_and_what_belongs_to_none() -> None:
    first, last, head = fsdp2(
        moment("forward", 0, activations=1000), moment("forward", 1), moment("forward", None, logits=5)
    )
    assert first == {"weights": 2 * SHARDS, "activations": 1000, "communication": 160 + 128 + 128}
    assert last["communication"] == 160 + 128
    assert head == {"weights": 2 * SHARDS, "logits": 5, "communication": 160 + 160}


def test_fsdp2_reduces_a_layer_s_gradients_from_a_second_copy() -> None:
    head, upper, lower, end = fsdp2(
        moment("backward", None, before=True, gradients=160),
        moment("backward", 1, gradients=160 + 128),
        moment("backward", 0, gradients=160 + 256),
        moment("backward", None, gradients=WHOLE),
    )
    ratio = 2 * SHARDS / WHOLE
    assert head["gradients"] == round(160 * ratio) + 160
    assert upper["gradients"] == round(288 * ratio) + 160 + 2 * 128
    assert lower["gradients"] == round(416 * ratio) + 160 + 2 * 128
    assert end["gradients"] == round(WHOLE * ratio) + 2 * 160


def test_fsdp2_keeps_whole_gradients_while_it_accumulates() -> None:
    (made,) = fsdp2(moment("forward", 0, gradients=WHOLE), accumulates=True)
    assert made["gradients"] == WHOLE + 2 * SHARDS


@pytest.mark.train
def test_fsdp2_keeps_codes_of_weights_at_rest() -> None:
    """By hand what tests/dist/rest_worker.py finds in two processes: a byte and a scale a group in place of two bytes,
    of all but the head and norms; uneven rows stay; all else is what plain weights take."""
    config = small_config(num_hidden_layers=2)
    settings = {"optim": "adamw", "lowmem_state": "8bit", "lowmem_step_in_backward": True, "max_grad_norm": 0.0}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "lm_head" not in n]
    for world in (2, 3):
        plain, codes = (
            plan(
                config,
                arguments(lowmem_weights=store, **settings),
                dtype="bfloat16",
                world_size=world,
                parallel="fsdp2",
            )
            for store in ("bf16_sr", "int8_sr")
        )
        rests = [p for p in matrices if len(p) % world == 0]
        saved = sum(p.numel() * (2 - 1 - 4 / (group_of(p.shape) or 1)) for p in rests) / world
        assert (saved > 0) == (world == 2)  # 3 divides no number of rows
        assert plain.parts["weights"] - codes.parts["weights"] == pytest.approx(saved, abs=1)
        assert plain.peak_bytes - codes.peak_bytes == plain.parts["weights"] - codes.parts["weights"]
        assert codes.settings["lowmem"]["lowmem_weights"] == "int8_sr"
