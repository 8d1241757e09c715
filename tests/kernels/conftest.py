"""Fixtures of the tests of fused steps."""

from typing import Any

import pytest
from torch import Tensor

from hf_lowmem.optim import slot


@pytest.fixture
def small_ones_are_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those from 4096 values on are: in the interpreter a step of so many takes a second."""
    monkeypatch.setattr(slot, "SMALLEST_COMPRESSED", 500)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many parameters each launch of a fused kernel had."""
    from hf_lowmem.kernels.step import launch as steps

    counts: list[int] = []
    inner = steps.run_steps

    def watch(rule: str, params: Any, *args: Any, **kwargs: Any) -> None:
        counts.append(len(params))
        inner(rule, params, *args, **kwargs)

    for module in ("adamw", "lion"):
        monkeypatch.setattr(f"hf_lowmem.kernels.{module}.triton.run_steps", watch)
    return counts


@pytest.fixture
def launched_on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many parameters each call of a CPU's fused kernel had."""
    from hf_lowmem.kernels.step import cpu

    counts: list[int] = []
    inner = cpu.run_steps

    def watch(rule: str, params: list[Tensor], *args, **kwargs) -> None:
        counts.append(len(params))
        inner(rule, params, *args, **kwargs)

    for module in ("adamw", "lion"):
        monkeypatch.setattr(f"hf_lowmem.kernels.{module}.cpu.run_steps", watch)
    return counts
