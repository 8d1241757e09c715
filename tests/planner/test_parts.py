"""A plan steps a few parts of a long parameter in the place of all that are alike: its answer is the same."""

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest

from hf_lowmem.optim import chunked
from hf_lowmem.planner import plan, step
from tests.planner.real import arguments, small_config

pytestmark = pytest.mark.train

PARTS = {"PART": 1 << 15, "CHUNK": 1 << 15}  # of which the small model's embedding has many
SETTINGS: dict[str, dict[str, Any]] = {
    "chunks of values": {"optim": "adamw", "lowmem_state": "int4", "lowmem_weights": "bf16_sr"},
    "rows, of columns' norms": {"optim": "scale", "lowmem_state": "8bit"},
    "rows of codes, and of a head": {
        "optim": "adam_mini",
        "lowmem_state": "8bit",
        "lowmem_weights": "int8_sr",
        "lowmem_step_in_backward": True,
        "max_grad_norm": 0,
    },
    "rows of a head alone": {"optim": "adamw", "lowmem_step_in_backward": True, "max_grad_norm": 0},
}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(fields, id=name, marks=[pytest.mark.slow] if "head" in name else [])
        for name, fields in SETTINGS.items()
    ],
)
def test_a_few_parts_take_what_all_take(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in PARTS.items():
        monkeypatch.setattr(chunked, name, size)
    made, seen = [], []
    for some in (step._some_of, list):

        def counted(parts: Sequence[int], some: Callable[[Sequence[int]], list[int]] = some) -> list[int]:
            seen.append((len(parts), len(some(parts))))
            return some(parts)

        with mock.patch.object(step, "_some_of", counted):
            args = arguments(max_length=16, **settings)
            made.append(plan(small_config(num_hidden_layers=1), args, dtype="bfloat16").to_dict() | {"seconds": 0})
    assert made[0] == made[1]
    assert any(few < many for many, few in seen), "nothing was left out"
