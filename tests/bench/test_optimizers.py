"""scripts/bench/optimizers.py: every part runs, a record goes on where it stopped, and the tables say what it holds."""

from pathlib import Path
from typing import Any

import pytest
import torch

import optimizers
from parts.optimizers import quality, report, schedule, speed
from parts.optimizers.settings import SETTINGS, Setting
from parts.record import read_rows
from parts.small_llama import SIZE, SMOKE

pytestmark = pytest.mark.train  # starts processes

COUNT = 50


def row(setting: Any, *, rate: float, seed: int, loss: float | None) -> dict[str, Any]:
    config = quality.configuration(setting, rate=rate, seed=seed, size=SIZE)
    sizes = {"state_bytes_per_parameter": 8.0, "weight_bytes_per_parameter": 4.0}
    return config | sizes | {"setting": setting.name, "heldout_loss": loss}


def tuned(record: Any, method: str, losses: dict[float, float]) -> None:
    for rate, loss in losses.items():
        seed = schedule.TUNING_SEED
        record.add(row(Setting(method), rate=rate, seed=seed, loss=loss))


def test_every_setting_trains() -> None:
    assert len({s.name for s in SETTINGS}) == len(SETTINGS) == COUNT
    for setting in SETTINGS:
        found = quality.run(setting, rate=1e-3, seed=0, size=SMOKE)
        assert 0 < found["heldout_loss"] < 10, setting.name
        assert found["state_bytes_per_parameter"] > 0


@pytest.mark.slow
def test_the_same_command_goes_on_where_the_record_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, plot = tmp_path / "optimizers.jsonl", tmp_path / "plot.png"
    settings = [Setting("adamw"), Setting("adamw", "8bit")]
    record = schedule.Record(path)
    while len(record.rows) < 5:  # as if it had been stopped here
        record.add(schedule.make(next(schedule.to_do(record, settings, [0, 1], SMOKE)), SMOKE))
    first = read_rows(path)
    names = [s.name for s in settings]
    command = ["--part", "quality", "--smoke", "--seeds", "0", "1", "--only", *names, "--record", str(path)]
    assert optimizers.main(command) == 0
    every = read_rows(path)
    assert every[: len(first)] == first
    scored = [(r["setting"], r["seed"]) for r in every if r["seed"] != schedule.TUNING_SEED]
    assert sorted(scored) == sorted((name, seed) for name in names for seed in (0, 1))
    assert all(r["commit"] is None or len(r["commit"]) >= 40 for r in every[len(first) :])
    capsys.readouterr()

    where = ["--record", str(path), "--plot", str(plot), "--speed-record", str(tmp_path / "none.jsonl")]
    assert optimizers.main(["--part", "report", "--smoke", *where]) == 0
    shown = capsys.readouterr().out
    mean = sum(r["heldout_loss"] for r in every if r["setting"] == "adamw 8bit") / 2
    assert f"{mean:.4f}" in next(line for line in shown.splitlines() if line.startswith("| adamw 8bit |"))
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_report_shows_both_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert optimizers.main(["--part", "report", "--plot", str(tmp_path / "plot.png")]) == 0
    shown = capsys.readouterr().out
    for title in ("Learning rates", "Codecs, against", "Projections", "bf16 weights", "Control", "Step, on", "Refresh"):
        assert f"### {title}" in shown


def test_a_spent_budget_starts_no_run(tmp_path: Path) -> None:
    record = tmp_path / "optimizers.jsonl"
    flags = ["--part", "quality", "--smoke", "--only", "adamw fp32", "--record", str(record), "--budget-minutes", "0"]
    assert optimizers.main(flags) == 0
    assert not record.exists()


def test_speed_is_a_ratio_to_torch_in_the_same_run(tmp_path: Path) -> None:
    record = tmp_path / "speed.jsonl"
    flags = ["--part", "speed", "--smoke", "--only", "adamw", "apollo", "--speed-record", str(record)]
    with torch.compiler.set_stance("force_eager"):  # torchao compiles a step for each shape, which takes a minute
        assert optimizers.main(flags) == 0
    rows = read_rows(record)
    steps = {r["setting"]: r for r in rows if r["measured"] == "step"}
    assert steps["torch AdamW fused"]["step_ratio"] == 1.0
    assert 8.0 < steps["adamw fp32"]["state_bytes_per_parameter"] < 8.01  # moments, and a step count a tensor
    assert all(r["step_ratio"] > 0 for r in steps.values() if "note" not in r)
    assert set(speed.PEERS) <= set(steps)
    assert {"galore svd", "galore subspace", "galore random"} <= {
        r["setting"] for r in rows if r["measured"] == "refresh"
    }


def test_what_cannot_be_built_is_an_error_unless_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(optimizers, "SETTINGS", [Setting("adamw", "int7"), Setting("adamw")])
    flags = ["--part", "quality", "--smoke", "--budget-minutes", "0", "--record", str(tmp_path / "r.jsonl")]
    with pytest.raises(SystemExit, match="--available"):
        optimizers.main(flags)
    assert optimizers.main([*flags, "--available"]) == 0
    assert capsys.readouterr().out.count("left out: adamw int7: ValueError") == 2


@pytest.mark.parametrize(
    ("losses", "next_rates"),
    [
        ({}, [1e-3, 3e-3, 1e-2]),
        ({1e-3: 5.0, 3e-3: 4.0}, [1e-2]),
        ({1e-3: 5.0, 3e-3: 4.0, 1e-2: 6.0}, []),
        ({1e-3: 5.0, 3e-3: 4.0, 1e-2: 3.0}, [3e-2]),
        ({1e-3: 3.0, 3e-3: 4.0, 1e-2: float("inf")}, [3e-4]),
        ({1e-3: 5.0, 3e-3: 4.0, 1e-2: 3.0, 3e-2: 2.0, 1e-1: 1.5, 3e-1: 1.0}, []),  # enough
    ],
)
def test_tuning_follows_the_best_rate_outwards(losses: dict[float, float], next_rates: list[float]) -> None:
    assert schedule.rates_to_try("adamw", losses) == next_rates


def test_settings_run_at_their_methods_best_rate_seed_after_seed(tmp_path: Path) -> None:
    record = schedule.Record(tmp_path / "r.jsonl")
    tuned(record, "adamw", {1e-3: 5.0, 3e-3: 4.0, 1e-2: 6.0})
    record.add(row(Setting("adamw"), rate=3e-3, seed=0, loss=4.0))
    settings = [Setting("adamw"), Setting("adamw", "8bit")]
    tasks = list(schedule.to_do(record, settings, [0, 1], SIZE))
    assert [(t.setting.name, t.rate, t.seed) for t in tasks] == [
        ("adamw 8bit", 3e-3, 0),
        ("adamw fp32", 3e-3, 1),
        ("adamw 8bit", 3e-3, 1),
    ]


def test_a_codec_is_compared_with_fp32_at_the_same_seed(tmp_path: Path) -> None:
    record = schedule.Record(tmp_path / "r.jsonl")
    tuned(record, "adamw", {1e-3: 5.0, 3e-3: 4.0, 1e-2: 6.0})
    for seed, loss in ((0, 4.0), (1, 5.0)):
        record.add(row(Setting("adamw"), rate=3e-3, seed=seed, loss=loss))
        record.add(row(Setting("adamw", "int8"), rate=3e-3, seed=seed, loss=loss * (1.001 + 0.002 * seed)))
        record.add(row(Setting("adamw", "fp8"), rate=3e-3, seed=seed, loss=loss * 1.006))
        record.add(row(Setting("adamw", "bf16"), rate=3e-3, seed=seed, loss=None if seed else loss))
    again = schedule.Record(record.path)  # from the file, as `--part report` reads it
    (text,) = report.quality_tables(report.Scores(again, SIZE))
    lines = {line.split(" | ")[0].removeprefix("| "): line.rstrip(" |") for line in text.splitlines()}
    assert lines["adamw int8"].endswith("4.5095 | +0.200 ± 0.100 | yes")  # differences of 0.1 and 0.3 %
    assert lines["adamw fp8"].endswith("+0.600 ± 0.000 | **no**")
    assert lines["adamw bf16"].endswith("diverged | diverged | **no**")
