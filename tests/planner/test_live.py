"""The log of storages: what counts, when it dies, and what a step must not ask."""

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.llama import modeling_llama

from hf_lowmem.planner import CannotSimulate, plan
from hf_lowmem.planner.allocations import Live
from tests.planner.real import arguments, small_config


def alive(live: Live) -> int:
    return sum(size for size, death in zip(live.sizes, live.deaths, strict=True) if death < 0)


def test_views_and_changes_in_place_are_the_storage_that_they_are_of() -> None:
    with Live(invent_numbers=False) as live:
        x = torch.zeros(10, 10)
        y, z = x.t()[2:], x.view(-1)
        x.add_(1)
        assert alive(live) == 400
        del x, y
        assert alive(live) == 400
        del z
        assert alive(live) == 0


def test_fake_tensors_live_as_real_ones_do() -> None:
    def step() -> list[tuple[int, int, int]]:
        with Live(invent_numbers=False) as live:
            model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
            optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
            for _ in range(2):
                model(torch.ones(3, 8)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        return list(zip(live.births, live.deaths, live.sizes, strict=True))

    real = step()
    with FakeTensorMode():
        fake = step()
    assert fake == real
    assert len(real) > 50


def test_a_storage_is_named_by_phase_and_module_in_forward_and_in_backward() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    with Live(invent_numbers=False) as live:
        live.watch(model)
        live.phase("forward")
        out = model(torch.ones(3, 8))
        live.phase("backward")
        out.sum().backward()
    sizes = {live.places[owner]: size for owner, size in zip(live.owners, live.sizes, strict=True)}
    assert sizes["forward", "0"] == 3 * 16 * 4
    assert sizes["forward", "1"] == 3 * 4 * 4
    assert {place for place in sizes if place[0] == "backward"} >= {("backward", "0"), ("backward", "1")}


def reads_a_number(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(x.new_zeros(*x.shape[:-1], self.intermediate_size)) * (1 if x.sum() > 0 else 2)


def has_a_shape_of_its_values(self: Any, x: torch.Tensor) -> torch.Tensor:
    return x + torch.nonzero(x).shape[0]


def has_an_operator_without_a_rule(self: Any, x: torch.Tensor) -> torch.Tensor:
    weights = x.new_zeros(1, x.shape[-1], x.shape[-1])  # grouped products have a rule for bf16, not for fp32
    ends = torch.full((1,), x.shape[1], dtype=torch.int32)
    return nn.functional.grouped_mm(x[0], weights, offs=ends)[None]


@pytest.mark.train
@pytest.mark.parametrize(
    ("forward", "operation"),
    [
        (reads_a_number, "_local_scalar_dense"),
        (has_a_shape_of_its_values, "aten.nonzero"),
        (has_an_operator_without_a_rule, "aten._grouped_mm"),
    ],
)
def test_a_model_that_depends_on_values_is_refused_by_operation_and_module(
    monkeypatch: pytest.MonkeyPatch, forward: Any, operation: str
) -> None:
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    with pytest.raises(CannotSimulate) as refused:
        plan(small_config(), arguments(), dtype="float32")
    assert operation in str(refused.value)
    assert "model.layers.0.mlp" in str(refused.value)
    assert "LowMemCallback" in str(refused.value)
