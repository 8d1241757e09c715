"""The example scripts and every configuration that we ship, run as a user runs them, on a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from hf_lowmem.codecs import codec_pair
from tests.conftest import tiny_llama
from tests.test_trainers import pair_data

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "integrations" / "trl").glob("*.yaml"))
FEW = ["--use_cpu", "--bf16", "False", "--max_steps", "2", "--max_length", "32"]
FEW += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--report_to", "none"]
SMALL = [*FEW, "--dtype", "float32"]


@pytest.fixture
def model_and_data(tmp_path: Path, tokenizer: Any) -> tuple[str, str]:
    model, data = tmp_path / "model", tmp_path / "data"
    tiny_llama().save_pretrained(model)
    tokenizer.save_pretrained(model)
    data.mkdir()
    for split in ("train", "test"):
        rows = [{k: str(v) for k, v in dict(row).items()} for row in pair_data(12)]  # type: ignore[call-overload]
        (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(model), str(data)


def as_text(rows_folder: str) -> None:
    """SFT reads a `text` column."""
    for path in Path(rows_folder).glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("\n".join(json.dumps({"text": r["prompt"] + r["chosen"]}) for r in rows))


def script_of(config: Path) -> str:
    return "train_preference.py" if "loss_type" in yaml.safe_load(config.read_text()) else "train_sft.py"


def run(script: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), *flags],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


@pytest.mark.parametrize("config", CONFIGS, ids=lambda p: p.stem)
def test_runs_from_its_configuration(config: Path, model_and_data: tuple[str, str], tmp_path: Path) -> None:
    model, data = model_and_data
    script = script_of(config)
    if script == "train_sft.py":
        as_text(data)
    out = tmp_path / "out"
    done = run(
        script, "--config", str(config), "--model_name_or_path", model, "--dataset_name", data,
        "--output_dir", str(out), *FEW, "--eval_strategy", "steps", "--eval_steps", "2", "--save_steps", "2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    AutoModelForCausalLM.from_pretrained(out)
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    assert any("eval_loss" in row for row in state["log_history"])
    settings = yaml.safe_load(config.read_text())
    saved = torch.load(out / "checkpoint-2" / "optimizer.pt", weights_only=True)
    methods = {(g["method"], codec_pair(g["state"]), g["weights"]) for g in saved["param_groups"]}
    assert methods == {(settings["optim"], codec_pair(settings["lowmem_state"]), settings["lowmem_weights"])}


def test_an_unknown_key_is_refused(model_and_data: tuple[str, str], tmp_path: Path) -> None:
    model, data = model_and_data
    done = run(
        "train_sft.py", "--model_name_or_path", model, "--dataset_name", data, "--output_dir", str(tmp_path / "o"),
        *SMALL, "--lowmem_stat", "int8",
    )  # fmt: skip
    assert done.returncode != 0
    assert "lowmem_stat" in done.stderr


def test_a_missing_split_is_named(model_and_data: tuple[str, str], tmp_path: Path) -> None:
    model, data = model_and_data
    done = run(
        "train_preference.py", "--model_name_or_path", model, "--dataset_name", data, "--output_dir",
        str(tmp_path / "o"), *SMALL, "--dataset_train_split", "trian",
    )  # fmt: skip
    assert done.returncode != 0
    assert "dataset_train_split='trian': " in done.stderr
