"""What each method sends beside FSDP2 itself: counted, and equal to the table in hf_lowmem/optim/sharded.py."""

import json

import pytest

from tests.dist.launch import launch
from tests.dist.wire import METHODS, RANK, M, N

PARAMETERS, LAYERS, HALF = 6, 2, 0.5  # of what is summed or gathered, a process of two sends a half
VALUES = LAYERS * (M * M + 2 * M * N)
NORM, VALUE = 8, 4  # squares are summed in float64, projections in fp32


def expected(name: str) -> float:
    """Bytes that a process of two sends in an ordinary step; a sum counts twice."""
    norms = {"lamb": 2, "apollo": 1, "apollo_mini": 3, "fira": 1}.get(name, 0) * PARAMETERS * NORM
    products = 4 * 4 * NORM * PARAMETERS if name == "natural_galore" else 0  # s = 4
    rank = 1 if name == "apollo_mini" else RANK
    gathers = {"apollo": 1, "apollo_mini": 0, "galore": RANK, "natural_galore": RANK, "fira": 2 * RANK + 1}
    down = (rank + gathers[name]) * N * VALUE * LAYERS if name in gathers else 0  # of the matrices with m < n
    return 2 * HALF * (PARAMETERS + norms + products) + HALF * down


@pytest.mark.dist
def test_bytes_over_the_wire() -> None:
    lines = [line.split(" ", 1) for line in launch(2, module="tests.dist.wire") if line != "all"]
    sent = {name: json.loads(text) for name, text in lines}
    assert list(sent) == list(METHODS)
    passes = 3 * HALF * VALUES * VALUE  # gathered for forward and for backward; the gradients scattered
    for name, found in sent.items():
        assert sum(found["passes"].values()) == passes, name
        assert sum(found["step"].values()) == expected(name), name
        assert sum(found["first"].values()) >= expected(name), name
    total = {name: passes + sum(found["step"].values()) for name, found in sent.items()}
    assert total["apollo"] <= 1.07 * total["adamw"]
    assert total["adamw"] <= 1.0001 * passes
