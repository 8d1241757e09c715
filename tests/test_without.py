"""What works where a package is not installed, and what is said where it is needed. Each case is a process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_scripts import as_text, model_and_data

__all__ = ["model_and_data"]  # a fixture
ROOT = Path(__file__).parents[1]

# As if a package were not there: it is not found, as of one that is not installed.
AWAY = """
import sys
from importlib.machinery import PathFinder
away, find = set(sys.argv[1].split(",")), PathFinder.find_spec
def look(name, *rest, **more):
    return None if name.split(".")[0] in away else find(name, *rest, **more)
PathFinder.find_spec = staticmethod(look)
from hf_lowmem.cli.main import main
model, data = sys.argv[2:]
step = ["--use_cpu", "--bf16", "False", "--max_steps", "1", "--max_length", "32", "--report_to", "none"]
step += ["--model_name_or_path", model, "--lowmem", "balanced", "--disable_tqdm", "True"]
"""
PLAIN = """
import torch
from transformers import AutoModelForCausalLM
from hf_lowmem import LowMemTrainer, LowMemTrainingArguments
args = LowMemTrainingArguments("out", lowmem="smallest", use_cpu=True, max_steps=2, report_to="none", disable_tqdm=True)
rows = [{"input_ids": list(range(3, 15)), "labels": list(range(3, 15))}] * 8
LowMemTrainer(AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16), args, train_dataset=rows).train()
assert [main(["doctor"]), main(["card", "out"]), main(["compare", "out"])] == [0, 0, 0]
assert main(["card", "out", "--plot", "step.png"]) == 1
assert main(["sft", *step, "--dataset_name", data]) == main(["plan", "--model", model]) == 1
"""
TRL = """
assert main(["plan", "--model", model, "--max_length", "32", "--lowmem", "balanced", "--device", "cpu"]) == 0
assert main(["plan", "--model", model, "--plot", "step.png"]) == 1
for command in ("dpo", "sft"):
    more = ["--loss_type", "asft"] if command == "dpo" else []
    assert main([command, *step, *more, "--dataset_name", f"{data}/{command}", "--output_dir", command]) == 0
"""
QUANTIZED = """
assert main(["plan", "--model", model, "--max_length", "32", "--use_peft", "--load_in_4bit"]) == 1
"""


def run(code: str, away: str, model: str, data: str, folder: Path) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", AWAY + code, away, model, data]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def both(data: str) -> None:
    """Folders of data for each command."""
    for command in ("dpo", "sft"):
        (Path(data) / command).mkdir()
        (Path(data) / command / "train.jsonl").write_text((Path(data) / "train.jsonl").read_text())
    as_text(f"{data}/sft")


@pytest.mark.train
def test_a_trainer_of_transformers_needs_none_of_four(model_and_data: tuple[str, str], tmp_path: Path) -> None:
    said = run(PLAIN, "matplotlib,bitsandbytes,trl,triton", *model_and_data, tmp_path)
    assert "hf-lowmem card: --plot needs matplotlib: pip install matplotlib" in said
    for command in ("sft", "plan"):
        assert f"hf-lowmem {command}: No module named 'trl'. `pip install trl` brings it" in said


@pytest.mark.slow
def test_trl_s_trainers_and_plans_need_none_of_three(model_and_data: tuple[str, str], tmp_path: Path) -> None:
    both(model_and_data[1])
    said = run(TRL, "matplotlib,bitsandbytes,triton", *model_and_data, tmp_path)
    assert "hf-lowmem plan: --plot needs matplotlib: pip install matplotlib" in said


@pytest.mark.slow
@pytest.mark.parametrize("package", ["matplotlib", "bitsandbytes", "triton", "numba", "rich", "deepspeed", "torchao"])
def test_without_one_of_them_alone(package: str, model_and_data: tuple[str, str], tmp_path: Path) -> None:
    both(model_and_data[1])
    code = TRL if package == "matplotlib" else "\n".join(line for line in TRL.splitlines() if "--plot" not in line)
    said = run(code + (QUANTIZED if package == "bitsandbytes" else ""), package, *model_and_data, tmp_path)
    assert package != "bitsandbytes" or "hf-lowmem plan: No module named 'bitsandbytes'. `pip install" in said
