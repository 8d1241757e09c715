"""README says what the records say, and what it shows can be run."""

import ast
import dataclasses
import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

import hf_lowmem
from hf_lowmem.codecs import CODECS, PAIRS
from hf_lowmem.memory import human_bytes
from hf_lowmem.optim import OPTIMIZERS
from hf_lowmem.specs import TIERS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RECORDS = ROOT / "scripts" / "bench" / "records"


@pytest.fixture
def made() -> Any:
    """The module that makes README's tables."""
    return importlib.import_module("_readme")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_the_table_of_states_is_the_record() -> None:
    rows = {row["setting"]: row for row in map(json.loads, (RECORDS / "states.jsonl").read_text().splitlines())}
    shown = [
        cells(line) for line in README.splitlines() if re.match(r"\| `(torch-)?[a-z0-9_]+-[a-z0-9_-]+` \| \d", line)
    ]
    assert {line[0].strip("`") for line in shown} >= {
        "torch-adamw",
        "adamw-int8",
        "adamw-fp8_expand",
        "apollo_mini-int8",
    }
    for line in shown:
        row = rows[line[0].strip("`")]
        expected = [f"{row['bytes_per_parameter']:.2f}", f"{row['heldout_loss']:.3f}", f"{row['step_ratio']:.1f}"]
        assert line[1:4] == expected
        if row["bytes_per_parameter_foretold"] is not None:
            assert row["bytes_per_parameter"] == pytest.approx(row["bytes_per_parameter_foretold"], rel=1e-9)


def test_the_promised_bytes_are_kept() -> None:
    rows = {row["setting"]: row for row in map(json.loads, (RECORDS / "states.jsonl").read_text().splitlines())}
    for setting, most in {
        "adamw-fp32": 8.0,
        "adamw-int8": 2.05,
        "adamw-fp8_expand": 2.15,
        "apollo_mini-int8": 0.6,
    }.items():
        assert rows[setting]["bytes_per_parameter"] <= most


def test_the_table_of_the_demo_is_the_record() -> None:
    record = json.loads((RECORDS / "demo.json").read_text())
    assert record["mode"] == "full"
    for row in record["training"]:
        line = next(cells(text) for text in README.splitlines() if text.startswith(f"| {row['run']} |"))
        parts = [f"{row[part] / 2**20:,.0f}" for part in ("weights", "gradients", "optimizer", "saved", "peak")]
        assert line[1:6] == parts
        assert line[6] == f"{row['heldout_loss']:.3f}"
        assert line[7] == f"{row['relative_speed']:.2f}"
    first, second = record["training"][:2]
    assert human_bytes(first["optimizer"]) in README
    assert human_bytes(second["optimizer"]) in README


def records(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RECORDS / name).read_text().splitlines()]


def test_the_table_of_update_errors_is_the_record() -> None:
    rows = [row for row in records("codecs.jsonl") if row["kind"] == "pair"]
    shown = [cells(line) for line in README.splitlines() if re.match(r"\| `\w+,\w+`[^|]*\| \d", line)]
    assert len(shown) == 5
    for line in shown:
        first, second = line[0].split("`")[1].split(",")
        found = [row for row in rows if (row["m"], row["v"]) == (first, second)]
        assert line[2:] == [f"{100 * r['relative_rms_error']:.2f} % / {r['worst_error']:.2f}" for r in found]
    both, ours = (
        [r["relative_rms_error"] for r in rows if (r["m"], r["v"]) == pair]
        for pair in (("fp8_expand", "fp8_expand"), PAIRS["8bit"])
    )
    assert all(a < b for a, b in zip(ours, both, strict=True)), "the recommended pair is below range expansion for both"


def test_the_table_of_activations_is_the_record(made: Any) -> None:
    for line in made.activation_rows(records("activations.jsonl")):
        assert line in README


def test_the_table_of_codecs_is_the_record(made: Any) -> None:
    for line in made.quality_table(made.scores()):
        assert line in README
    for name, figure in made.quality_figures(made.scores()).items():
        assert figure in README, name


def test_the_table_of_step_times_is_the_record(made: Any) -> None:
    rows = records("optimizers_speed.jsonl")
    for line in made.speed_rows(rows):
        assert line in README
    refresh = {row["setting"]: row for row in rows if row["measured"] == "refresh"}
    assert refresh["galore svd"]["refresh_seconds"] >= 10 * refresh["galore subspace"]["refresh_seconds"]


@pytest.mark.parametrize(
    ("script", "record", "function"),
    [("plan_table", "plan_table", "markdown"), ("budget", "budget", "table"), ("wire", "wire", "table")],
)
def test_the_tables_of_plans_and_bytes_sent_are_the_records(made: Any, script: str, record: str, function: str) -> None:
    rows = records(f"{record}.jsonl")
    arguments = ("layers",) if script == "wire" else ()
    for line in getattr(importlib.import_module(script), function)(rows, *arguments):
        assert line in README


def test_every_budget_s_answer_fits_when_planned_again() -> None:
    rows = records("budget.jsonl")
    assert {row["budget"] for row in rows} == {"16GiB", "24GiB", "48GiB", "80GiB"}
    assert all(row["fits"] for row in rows if row["chosen"] is not None)


def test_what_the_records_promise(made: Any) -> None:
    """Codecs within 0.5 % of fp32 state, `subspace` within 0.3 % of `svd`, bf16 stores within 0.3 % of fp32 masters."""
    for comparison in made._report.comparisons():
        for setting, reference in comparison.rows:
            if setting.weights == "keep" or setting.name == reference.name:
                continue
            assert made.difference(made.scores(), setting, reference)[0] <= comparison.limit, setting.name
    losses = [row for row in records("activations.jsonl") if row["part"] == "loss"]
    for tier in TIERS:
        ours, theirs = ([r["heldout_loss"] for r in losses if r["way"] == way] for way in (tier, "HuggingFace"))
        assert len(ours) == len(theirs) == 3
        assert sum(ours) <= 1.003 * sum(theirs), tier


def test_every_python_block_parses_and_its_names_exist() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "hf_lowmem":
                assert all(hasattr(hf_lowmem, alias.name) for alias in node.names)


def test_every_method_codec_and_field_is_named() -> None:
    for name in (*OPTIMIZERS, *CODECS, *(f.name for f in dataclasses.fields(hf_lowmem.LowMemArguments))):
        assert f"`{name}`" in README
