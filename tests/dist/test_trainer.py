"""LowMemTrainer under FSDP2 with accelerate's own saves: resumed bit for bit, and step in backward."""

import pytest


@pytest.mark.train
@pytest.mark.dist
def test_a_trainer_resumes_and_steps_in_backward(trained: list[str]) -> None:
    assert trained[1:] == ["SHARDED_STATE_DICT", "FULL_STATE_DICT", "all"]
