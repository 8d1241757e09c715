"""scripts/bench/overhead.py: launches of a step, which are counted anew, and what its record says of them."""

from unittest import mock

import pytest
import torch

import overhead
from hf_lowmem.kernels import Kernel
from parts.record import read_rows

WEIGHTS = 224  # low-rank ones of Llama-3-8B
REST = 20  # launches of all others and of the counts


@pytest.mark.parametrize(("method", "each"), [("apollo", 5), ("apollo_mini", 4)])
def test_a_low_rank_weight_has_few_launches(method: str, each: int) -> None:
    """Of ours and of torch's: a basis, a product, and a share of what a group of weights needs."""
    optimizer = overhead.build(method, "8bit", "launch", "bf16_sr", 256)
    assert sum(len(g["params"]) for g in optimizer.param_groups if g["rank"]) == WEIGHTS
    with overhead.counting(method) as names:
        optimizer.step()
        names.clear()
        optimizer.step()
        ours = len(names)
        inner = mock.patch.object(Kernel, "__call__", lambda self, *args: self.pick(*args)(*args))
        with inner, overhead.TorchKernels() as torchs:
            optimizer.step()
    assert ours + torchs.count <= each * WEIGHTS + REST
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("setting", ["apollo", "apollo_mini"])
def test_the_record_holds_the_ceilings(setting: str) -> None:
    rows = {row["label"]: row for row in read_rows(overhead.RECORD) if row["setting"] == f"{setting} 8bit bf16_sr"}
    before, after = rows["launches after"], rows["shared launches"]
    assert after["triton"] + after["torch"] <= 1600
    assert after["step_ms"] <= before["step_ms"] / 3
