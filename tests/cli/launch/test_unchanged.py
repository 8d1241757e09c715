"""`hf-lowmem launch` of a script that knows nothing of hf_lowmem: the section is applied, or the script is stopped."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from hf_lowmem.cli.launch import given_options, prepare, through_worker
from hf_lowmem.cli.worker import main
from hf_lowmem.training import section
from tests.cli.launch.test_launch import ROOT, run
from tests.cli.launch.test_settings import written

SECTION = {"optim": "adamw", "lowmem_state": "8bit", "lowmem_activations": "fp8"}
ONE = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "mixed_precision": "no", "num_machines": 1,
       "num_processes": 1, "use_cpu": True}  # fmt: skip
DDP = ONE | {"distributed_type": "MULTI_GPU", "num_processes": 2, "use_cpu": False}

# As in any tutorial; the arguments of the second trainer come from a command line, with every default said.
TRAINS = """
import json, os, sys
import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer
from tests.conftest import tiny_llama
from tests.training.test_trainers import token_data
from tests.conftest import word_tokenizer

assert __name__ == "__main__"
try:
    conflict = str(TrainingArguments("unused", use_cpu=True, optim="sgd"))
except ValueError as error:
    conflict = str(error)
agreed = TrainingArguments("unused", use_cpu=True, optim="adamw").lowmem_state
said = []
for name in ("sft", "parsed", "plain"):
    common = {"max_steps": 2, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no",
              "per_device_train_batch_size": 2, "disable_tqdm": True}
    folder = f"{sys.argv[1]}/{name}"
    if name == "parsed":
        flags = [text for key, value in common.items() for text in (f"--{key}", str(value))]
        (args,) = HfArgumentParser(SFTConfig).parse_args_into_dataclasses(["--output_dir", folder, *flags])
    else:
        args = (TrainingArguments if name == "plain" else SFTConfig)(folder, **common)
    made = Trainer if name == "plain" else SFTTrainer
    more = {} if name == "plain" else {"processing_class": word_tokenizer()}
    trainer = made(tiny_llama(), args=args, train_dataset=token_data(), **more)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    said.append([type(optimizer).__module__, args.lowmem_state, trainer.activations is not None,
                 args.gradient_checkpointing, args.adam_beta2, isinstance(args, TrainingArguments)])
if int(os.environ.get("RANK", "0")) == 0:
    with open(f"{sys.argv[1]}/said.json", "w") as file:
        json.dump([said, conflict, agreed, sys.argv, sys.path[0], __file__], file)
"""

LOOP = """
import torch
assert "hf_lowmem.training.arguments" not in __import__("sys").modules
weight = torch.ones(3, requires_grad=True)
(weight * 2).sum().backward()
print("trained")
"""


def check(folder: Path, script: Path) -> None:
    said, conflict, agreed, argv, path, file = json.loads((folder / "said.json").read_text())
    assert "optim='adamw', and the script sets optim='sgd'. Take one of the two out." in conflict
    assert agreed == "8bit"
    assert said == [["hf_lowmem.optim.adamw", "8bit", True, False, 0.999, True]] * 3
    assert (argv, path, file) == ([str(script), str(folder), "--flag"], str(folder), str(script))


@pytest.mark.dist
@pytest.mark.train
@pytest.mark.parametrize("content", [ONE, pytest.param(DDP, marks=pytest.mark.slow)], ids=["one", "ddp"])
def test_an_unchanged_script_trains_with_the_section(content: dict[str, Any], tmp_path: Path) -> None:
    """And where it says something else than the section, it is stopped."""
    script = tmp_path / "train.py"
    script.write_text(TRAINS)
    file = written(tmp_path, content | {section.KEY: SECTION})
    done = run("--config_file", file, "--main_process_port", "0", str(script), str(tmp_path), "--flag")
    assert (tmp_path / "said.json").exists(), done.stderr[-4000:]
    check(tmp_path, script)


def worker(folder: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What accelerate starts, without accelerate."""
    script = folder / "script.py"
    script.write_text(code)
    env = {"PATH": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-m", "hf_lowmem.cli.worker", str(script)]
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=folder, timeout=300)


@pytest.mark.train
def test_a_loop_that_applies_nothing_is_stopped_at_its_first_gradient(tmp_path: Path) -> None:
    done = worker(tmp_path, LOOP, HF_LOWMEM_CONFIG=json.dumps(SECTION))
    assert done.returncode != 0
    assert "is applied by nobody" in done.stderr
    assert "LowMemPlugin.from_env().prepare(accelerator, model, ...)" in done.stderr
    assert "trained" not in done.stdout


def test_a_process_that_the_section_does_not_reach_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(section.VARIABLE, raising=False)
    with pytest.raises(SystemExit, match="HF_LOWMEM_CONFIG did not reach this process"):
        main(["script.py"])


def options(*words: str) -> argparse.Namespace:
    return launch_command_parser().parse_args([*words, "script.py"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--use_fsdp", "--fsdp_version", "1"], r"fsdp_version: 1 cannot be combined with optim='adamw'"),
        (["--use_fsdp"], r"fsdp_version: 1 cannot be combined with optim='adamw'"),
        (["--use_deepspeed", "--zero_stage", "3"], r"zero_optimization.stage=3 cannot be combined with optim='adamw'"),
        (["--mixed_precision", "fp16"], r"mixed_precision: fp16 cannot be combined with lowmem_step_in_backward"),
        (["--num_processes", "2"], r"num_processes=2 cannot be combined with lowmem_step_in_backward"),
        (["--dynamo_backend", "inductor"], r"dynamo_backend: INDUCTOR cannot be combined with lowmem_step_in_backward"),
        (["--gradient_accumulation_steps", "4"], r"gradient_accumulation_steps: 4 with step in backward"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_command_line_counts_more_than_the_file(words: list[str], message: str, tmp_path: Path) -> None:
    asked = {"optim": "adamw", "lowmem_step_in_backward": "deepspeed" not in words[0]}
    file = written(tmp_path, ONE | {section.KEY: asked})
    prepare(file)
    with pytest.raises(ValueError, match=message):
        prepare(file, given_options(options(*words)))


def test_what_our_worker_cannot_stand_before_is_refused() -> None:
    asked = options("--no_python")
    with pytest.raises(ValueError, match=r"--no_python with hf_lowmem_config: .*Start a script or a module"):
        through_worker(asked, "NO")
    with pytest.raises(ValueError, match=r"distributed_type: XLA with hf_lowmem_config"):
        through_worker(options(), "XLA")
    module = options("-m")
    through_worker(module, "NO")
    assert (module.training_script, module.module) == ("hf_lowmem.cli.worker", True)
    assert module.training_script_args == ["-m", "script.py"]


def test_a_shipped_file_is_what_a_file_can_be(tmp_path: Path) -> None:
    """So that ONE and DDP above are refused for nothing of their own."""
    assert prepare(written(tmp_path, DDP | {section.KEY: SECTION}))[0] == SECTION
    assert yaml.safe_load((ROOT / "integrations" / "accelerate" / "ddp.yaml").read_text()).keys() >= set(ONE)
