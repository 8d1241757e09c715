"""bitsandbytes' optimizers on a CPU, where a step is made of torch's operators, whose temporaries count."""

import pytest
import torch

from hf_lowmem.planner import plan
from tests.planner.real import arguments, measure, small_config


@pytest.mark.train
def test_the_peak_of_a_step_in_8_bits_is_the_measured_one() -> None:
    asked = {"optim": "adamw_8bit", "gradient_checkpointing": False}
    made = plan(small_config(), arguments(**asked), dtype="float32", device="cpu")
    assert made.phase == "optimizer"
    assert made.peak_bytes == pytest.approx(measure(small_config(), arguments(**asked), torch.float32).peak, rel=1e-3)
