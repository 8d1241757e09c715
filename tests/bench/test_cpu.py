"""scripts/bench/cpu.py: what it measures, and what its record says."""

import pytest

import cpu
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
