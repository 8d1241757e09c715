"""`hf-lowmem launch` as a user types it: processes, the section in each of them, and a status that tells."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed.run
import yaml
from accelerate.commands import launch as accelerate_launch

from hf_lowmem.cli.main import main
from hf_lowmem.training import section
from tests.dist.imported import run_module

ROOT = Path(__file__).parents[3]
WORKER = ["-m", "hf_lowmem.cli.worker"]
WITHOUT_A_FILE = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
FILES = sorted((ROOT / "integrations" / "accelerate").glob("*.yaml"))

SCRIPT = """
import json, os, sys
from accelerate import Accelerator
from hf_lowmem.training.plugin import LowMemPlugin

accelerator = Accelerator(cpu=True)
plugin = LowMemPlugin.from_env()
said = [accelerator.num_processes, plugin.optim, plugin.lowmem_state, plugin.lowmem_activations, sys.argv[2:]]
with open(f"{sys.argv[1]}/{accelerator.process_index}.json", "w") as file:
    json.dump(said, file)
"""


def run(
    *arguments: str, forked: bool = False, seconds: int = 3600, **environment: str
) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | environment
    if forked:
        return run_module("tests.cli.launch.forked", arguments, env, seconds)
    command = [sys.executable, "-m", "hf_lowmem.cli.main", "launch", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT, timeout=seconds)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_file_that_we_ship_starts_what_it_says(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the moment when processes would be started; on a CPU DDP and FSDP2 really start in test_trainers.py."""
    started: list[dict[str, Any]] = []

    def take_over(options: Any) -> None:  # torchrun's
        words = [options.training_script, *options.training_script_args]
        found = {"processes": int(options.nproc_per_node), "words": words, "env": dict(os.environ)}
        started.append(found | {"module": options.module})

    def open_process(words: list[str], env: dict[str, str]) -> mock.Mock:
        started.append({"processes": 1, "words": words[1:], "env": env, "module": False})
        return mock.Mock(returncode=0)

    monkeypatch.setattr(torch.distributed.run, "run", take_over)
    monkeypatch.setattr(accelerate_launch, "subprocess", mock.Mock(Popen=open_process))
    monkeypatch.setattr(accelerate_launch, "is_deepspeed_available", lambda: True)
    runner = mock.Mock(DEEPSPEED_ENVIRONMENT_NAME=".deepspeed_env")
    monkeypatch.setitem(sys.modules, "deepspeed.launcher.runner", runner)
    monkeypatch.setenv(section.VARIABLE, "")  # which launch sets, and monkeypatch puts back

    assert main(["launch", "--config_file", str(file), "script.py", "--flag"]) == 0
    (found,) = started
    content = yaml.safe_load(file.read_text())
    env, engine = found["env"], content["distributed_type"]
    assert found["processes"] == content["num_processes"]
    assert found["words"] in ([*WORKER, "script.py", "--flag"], [WORKER[1], "script.py", "--flag"])
    assert found["module"] or found["words"][0] == "-m"
    assert json.loads(env[section.VARIABLE]) == content[section.KEY]
    assert env["ACCELERATE_MIXED_PRECISION"] == content["mixed_precision"]
    assert env.get("ACCELERATE_USE_CPU", "false").lower() == "false"
    assert (env.get("ACCELERATE_USE_FSDP") == "true") == (engine == "FSDP")
    assert (env.get("ACCELERATE_USE_DEEPSPEED") == "true") == (engine == "DEEPSPEED")
    if engine == "FSDP":
        assert env["FSDP_VERSION"] == "2"
        assert env["FSDP_STATE_DICT_TYPE"] == content["fsdp_config"]["fsdp_state_dict_type"]
    if engine == "DEEPSPEED":
        assert env["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == str(content["deepspeed_config"]["zero_stage"])


@pytest.mark.dist
@pytest.mark.slow
def test_one_gpu_starts_one_process(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = run("--config_file", "integrations/accelerate/one_gpu.yaml", str(script), str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "0.json").read_text()) == [1, "adamw", "8bit", "checkpoint_fp8", []]


@pytest.mark.dist
@pytest.mark.slow
def test_without_a_file_the_variable_serves_and_a_failure_is_a_status(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + "\nsys.exit(3)\n")
    done = run(*WITHOUT_A_FILE, str(script), str(tmp_path), HF_LOWMEM_CONFIG='{"optim": "lion"}')
    assert done.returncode != 0
    assert json.loads((tmp_path / "0.json").read_text())[:2] == [1, "lion"]


def test_without_a_file_the_variable_reaches_the_process_and_its_failure_is_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As above, up to the moment when the process would be started."""
    started: list[dict[str, str]] = []

    def open_process(words: list[str], env: dict[str, str]) -> mock.Mock:
        assert words[1:] == [*WORKER, "script.py"]
        started.append(env)
        return mock.Mock(returncode=3)

    processes = mock.Mock(Popen=open_process, CalledProcessError=subprocess.CalledProcessError)
    monkeypatch.setattr(accelerate_launch, "subprocess", processes)
    monkeypatch.setenv(section.VARIABLE, '{"optim": "lion"}')
    assert main(["launch", *WITHOUT_A_FILE, "script.py"]) == 3
    assert json.loads(started[0][section.VARIABLE]) == {"optim": "lion"}
