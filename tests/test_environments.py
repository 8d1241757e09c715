"""Environments that the shell scripts make, with stubs for what would download: their versions, and what runs there."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Writes down how it was called and under which constraints; only programs on its standard input are run.
PYTHON = f"""#!/usr/bin/env bash
if [ "$1" = - ]; then exec {sys.executable} "$@"; fi
if [ "$1 $2" = "-c import torch" ]; then exit "${{HAS_TORCH:-0}}"; fi
if [ "${{@: -1}}" = "${{FAILS:-}}" ]; then exit 1; fi
echo "python $*" >> "$CALLS"
"""
TOOL = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$CALLS"
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The scripts and pyproject.toml, and environments whose programs are stubs."""
    (tmp_path / "scripts").mkdir()
    for name in ("_env.sh", "test.sh"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name in (".venv", ".venv-oldest"):
        programs = tmp_path / name / "bin"
        programs.mkdir(parents=True)
        (programs / "activate").write_text(f'export VIRTUAL_ENV="{tmp_path / name}" PATH="{programs}:$PATH"\n')
        for program, text in {"python": PYTHON, "ruff": TOOL, "pyright": TOOL}.items():
            (programs / program).write_text(text)
            (programs / program).chmod(0o755)
    (tmp_path / "nvidia-smi").write_text("#!/usr/bin/env bash\nexit 1\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    return tmp_path


def run(clone: Path, *flags: str, active: str = "", **variables: str) -> list[str]:
    """What `scripts/test.sh` called, in order."""
    calls = clone / "calls"
    calls.unlink(missing_ok=True)
    dropped = ("VIRTUAL_ENV", "CONDA_PREFIX", "PIP_CONSTRAINT", "PYTEST_WORKERS")
    env = {k: v for k, v in os.environ.items() if k not in dropped} | {"CALLS": str(calls)} | variables
    env["PATH"] = f"{clone}:{env['PATH']}"
    if active:
        env["VIRTUAL_ENV"] = str(clone / active)
        env["PATH"] = f"{clone / active / 'bin'}:{env['PATH']}"
    done = subprocess.run(
        ["bash", str(clone / "scripts" / "test.sh"), *flags], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return calls.read_text().splitlines()


def test_the_newest_environment_runs_style_types_and_tests(clone: Path) -> None:
    *_, style, lint, types, tests = run(clone, active=".venv")
    assert [style, lint, types] == ["ruff format --check .", "ruff check .", "pyright "]
    assert tests == "python -m pytest -q -n 2 --dist worksteal -m not slow"
    assert not (clone / ".venv-oldest" / "oldest.txt").exists()


def test_the_oldest_environment_has_the_lower_end_of_every_range_and_runs_tests_alone(clone: Path) -> None:
    """In its own folder even where another environment is active."""
    calls = run(clone, "--oldest", "-k", "adamw", active=".venv")
    assert calls[-1] == "python -m pytest -q -n 2 --dist worksteal -k adamw"
    assert f"python -m pip install --quiet --editable {clone}[test]" in calls
    assert not any(call.startswith(("ruff", "pyright")) for call in calls)
    assert run(clone, "--oldest")[-1] == "python -m pytest -q -n 2 --dist worksteal -m not slow"
    pins = dict(line.split("==") for line in (clone / ".venv-oldest" / "oldest.txt").read_text().split())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = [re.split(r">=|[,;]", text.replace(" ", ""))[:2] for text in project["dependencies"] if ">=" in text]
    assert pins == {name: f"{least}.*" for name, least in ranges}
    assert pins.keys() >= {"torch", "transformers", "triton", "trl", "accelerate", "peft"}


def test_the_oldest_torch_is_the_one_that_is_installed(clone: Path) -> None:
    """A build for the CPU by name, and where there is none whatever has the version."""
    oldest = re.search(r"torch>=([\d.]+)", (ROOT / "pyproject.toml").read_text())
    assert oldest is not None
    cpu, version = f"torch=={oldest[1]}.0+cpu", f"torch=={oldest[1]}.*"
    if sys.platform == "linux":
        assert f"python -m pip install --quiet {cpu}" in run(clone, "--oldest", HAS_TORCH="1")
        calls = run(clone, "--oldest", HAS_TORCH="1", FAILS=cpu)
        assert f"python -m uv pip install --quiet --torch-backend cpu {version}" in calls
    else:
        assert f"python -m pip install --quiet {version}" in run(clone, "--oldest", HAS_TORCH="1")
