"""Element-wise methods under DeepSpeed's ZeRO-1 and ZeRO-2, on two gloo processes."""

import importlib.util
import itertools
from pathlib import Path

import pytest

from tests.dist.launch import launch

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="needs DeepSpeed, which is no dependency of ours: DS_BUILD_OPS=0 pip install deepspeed",
    ),
]


@pytest.mark.slow
def test_two_processes_are_one_and_resume_and_what_cannot_work_is_refused(tmp_path: Path) -> None:
    lines = launch(2, str(tmp_path), module="tests.dist.zero_worker")
    passed = [line for line in lines if not line.startswith("apart")]
    cases = itertools.product(("1", "2"), ("adamw", "lion"), ("fp32", "int8", "8bit"))
    assert set(passed) == {
        "refused",
        "bad",
        "trainers",
        "plugins",
        "all",
        *(" ".join(("equals", *case)) for case in cases),
    }
