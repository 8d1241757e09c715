"""scripts/bench/cpu.py and cpu_layers.py: what they measure, and what their records say."""

import pytest

import cpu
import cpu_layers
from parts.optimizers.speed import SMOKE
from parts.record import read_rows


def test_every_setting_is_measured_beside_torch() -> None:
    rows = cpu.measure(SMOKE, 1)
    settings = [("torch AdamW fused", "")]
    settings += [(f"{method} 8bit", runs) for method in cpu.METHODS for runs in ("kernels", "reference")]
    assert [(row["setting"], row["runs"]) for row in rows] == settings
    assert rows[0]["step_ratio"] == 1.0
    assert cpu.report(rows).count("\n") == 1 + len(settings)


@pytest.mark.parametrize(("setting", "most"), [("adamw 8bit", 6.0), ("apollo_mini 8bit", 3.5), ("lion 8bit", 3.0)])
def test_the_record_holds_the_ceilings(setting: str, most: float) -> None:
    rows = [row for row in read_rows(cpu.RECORD) if row["setting"] == setting]
    kernels = {row["threads"]: row["step_ratio"] for row in rows if row["runs"] == "kernels"}
    reference = {row["threads"]: row["step_ratio"] for row in rows if row["runs"] == "reference"}
    assert kernels[1] <= most
    assert all(kernels[n] < reference[n] for n in kernels)


def test_every_tier_is_measured_beside_huggingface() -> None:
    rows = cpu_layers.measure(1, layers=1, tokens=8)
    ways = {(row["way"], row["runs"]) for row in rows}
    assert ways == {("HuggingFace", ""), ("HuggingFace, checkpointing", "")} | {
        (tier, runs) for tier in cpu_layers.TIERS for runs in cpu_layers.IMPLS
    }
    assert rows[0]["ratio"] == 1.0
    assert all(row["ratio"] > 0 for row in rows)


def test_with_kernels_a_lossy_tier_costs_less_than_checkpointing() -> None:
    ratios = {(row["way"], row["runs"]): row["ratio"] for row in read_rows(cpu_layers.RECORD)}
    checkpointing = ratios["HuggingFace, checkpointing", ""]
    assert ratios["fp8", "kernels"] < checkpointing < ratios["fp8", "reference"]
