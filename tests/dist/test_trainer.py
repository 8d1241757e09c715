"""LowMemTrainer under FSDP2 with accelerate's own saves: resumed bit for bit, and step in backward."""

from pathlib import Path

import pytest

from tests.dist.launch import launch


@pytest.mark.train
@pytest.mark.dist
def test_a_trainer_resumes_and_steps_in_backward(tmp_path: Path) -> None:
    passed = launch(2, str(tmp_path), module="tests.dist.trainer_worker")
    assert passed == ["SHARDED_STATE_DICT", "FULL_STATE_DICT", "all"]
