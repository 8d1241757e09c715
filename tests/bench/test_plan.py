"""The planner's benchmarks at toy size, so that they cannot rot; and a clear word where there is no CUDA device."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import long_sequences
import plan_table as table
import plan_vs_cuda
from parts.record import ROOT, read_rows
from parts.streams import real, times

pytestmark = pytest.mark.train  # starts processes

BENCH = ROOT / "scripts" / "bench"


def run(script: str, *flags: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(BENCH / script), *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=3600)


def test_the_table_shows_what_it_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "table.jsonl"
    assert table.main(["--toy", "--record", str(record)]) == 0
    theirs, ours = read_rows(record)
    assert theirs["peak_bytes"] == sum(theirs["parts"].values()) > ours["peak_bytes"] == sum(ours["parts"].values())
    assert ours["commit"]
    lines = capsys.readouterr().out.splitlines()
    assert lines == table.markdown([theirs, ours])
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {theirs['setting']}", f"| {ours['setting']}"]


def test_the_longest_sequences_show_what_they_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "long.jsonl"
    assert long_sequences.main(["--toy", "--record", str(record)]) == 0
    rows = read_rows(record)
    assert [row["setting"] for row in rows] == [*long_sequences.SETTINGS]
    assert [row["host_bytes"] > 0 for row in rows] == ["lowmem_offload" in row["fields"] for row in rows]
    assert capsys.readouterr().out.splitlines()[-len(rows) - 2 :] == long_sequences.table(rows)
    # Another part leaves these as they are, and one setting the others.
    (row,) = times.rows(64, 1, (), real.TOY)
    assert row["ratio"] == 1
    ran = {"peak_bytes": 2**30, "process_bytes": 2**31, "cpu_seconds": 7.2}
    for beside, cells in (({}, ["", "", "not run"]), (ran, ["1.00 GiB", "2.00 GiB", "7 s"])):
        row = {"part": "real", "setting": "HF checkpointing", "tokens": 8192, "planned_bytes": 2**30} | beside
        assert (
            long_sequences.table_of_real([*rows, row])[2]
            == f"| {' | '.join(['HF checkpointing', '8,192', '1.00 GiB', *cells])} |"
        )


@pytest.mark.slow
def test_the_longest_that_is_found_is_what_the_command_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "long.jsonl"
    assert long_sequences.main(["--part", "auto", "--toy", "--record", str(record)]) == 0
    rows = read_rows(record)
    assert [(row["setting"], row["tokens"]) for row in rows] == [(name, 192) for name in long_sequences.AUTO]
    assert all(row["to_have_free"] <= 2 * 2**30 and "--max_length auto" in row["asked"] for row in rows)
    assert capsys.readouterr().out.splitlines()[-2:] == long_sequences.table_of_auto(rows)[2:]


def test_every_row_of_the_table_has_its_measured_costs() -> None:
    for settings in table.SETTINGS.values():
        costs = table.loss_costs(settings)
        assert costs.startswith("weights +")
        assert ("activations" in costs) == ("lowmem_activations" in settings)
        assert ("states" in costs) == ("8bit" in str(settings))
        assert (f"method {table.NOT_MEASURED}" in costs) == settings["optim"].startswith("apollo")


def test_the_comparison_with_cuda_says_that_it_needs_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        plan_vs_cuda.main(["--record", str(tmp_path / "cuda.jsonl")])
    assert "no CUDA device is visible" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_comparison_with_cuda_runs_at_toy_size_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    record = tmp_path / "cuda.jsonl"
    done = run("plan_vs_cuda.py", "--toy", "--record", str(record))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_rows(record)
    assert len(rows) == len(done.stdout.splitlines()) == 3
    assert all(-0.01 <= row["foretold"] / row["measured"] - 1 <= 0.03 for row in rows)
    again = run("plan_vs_cuda.py", "--toy", "--record", str(record))
    assert (again.returncode, again.stdout) == (0, "")


@pytest.mark.slow
def test_a_headline_counts_the_command_s_own_time_and_memory() -> None:
    done = run("plan_headlines.py", "--toy")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "planned in" in done.stdout
