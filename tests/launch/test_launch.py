"""`hf-lowmem launch` as a user types it: processes, the section in each of them, and a status that tells."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import json, os, sys
from accelerate import Accelerator
from hf_lowmem.plugin import LowMemPlugin

accelerator = Accelerator(cpu=True)
plugin = LowMemPlugin.from_env()
said = [accelerator.num_processes, plugin.optim, plugin.lowmem_state, plugin.lowmem_activations, sys.argv[2:]]
with open(f"{sys.argv[1]}/{accelerator.process_index}.json", "w") as file:
    json.dump(said, file)
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | environment
    command = [sys.executable, "-m", "hf_lowmem.cli", "launch", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT, timeout=300)


@pytest.mark.dist
def test_every_process_has_the_section(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = run("--config_file", "integrations/accelerate/cpu.yaml", "--main_process_port", "0", str(script),
               str(tmp_path), "--flag", "of the script")  # fmt: skip
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        said = json.loads((tmp_path / f"{rank}.json").read_text())
        assert said == [2, "adamw", "8bit", "exact", ["--flag", "of the script"]]


@pytest.mark.dist
def test_without_a_file_the_variable_serves_and_a_failure_is_a_status(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + "\nsys.exit(3)\n")
    done = run("--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
               str(script), str(tmp_path), HF_LOWMEM_CONFIG='{"optim": "lion"}')  # fmt: skip
    assert done.returncode != 0
    assert json.loads((tmp_path / "0.json").read_text())[:2] == [1, "lion"]
