"""README says what the records say, and what it shows can be run."""

import ast
import json
import re
from pathlib import Path

import pytest

import hf_lowmem
from hf_lowmem.codecs import CODECS
from hf_lowmem.memory import human_bytes
from hf_lowmem.optim import OPTIMIZERS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RECORDS = ROOT / "scripts" / "bench" / "records"


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


def test_every_python_block_parses_and_its_names_exist() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "hf_lowmem":
                assert all(hasattr(hf_lowmem, alias.name) for alias in node.names)


def test_every_method_codec_and_field_is_named() -> None:
    for name in (*OPTIMIZERS, *CODECS, *(f for f in hf_lowmem.LowMemArguments.__dataclass_fields__)):
        assert f"`{name}`" in README
