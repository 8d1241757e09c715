"""Start a worker module on several gloo processes, as torchrun does: see start.py."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
BETWEEN = "--"


def launch(processes: int, *words: str, module: str = "tests.dist.worker", seconds: int = 3600) -> list[str]:
    """What the worker printed as "passed ...", one entry a line; "all" is its last."""
    (passed,) = launch_jobs(processes, [words], module=module, seconds=seconds)
    return passed


def launch_jobs(
    processes: int, jobs: Sequence[Sequence[str]], module: str = "tests.dist.worker", seconds: int = 3600
) -> list[list[str]]:
    """Several jobs of a worker one after another, in processes that are started once.

    gloo may end a process with "terminate called without an active exception" after everything has passed, so the exit
    code says nothing: "passed all" is the last word of each job.
    """
    several = ["-m", "tests.dist.start", str(processes)]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    run = [sys.executable, *(several if processes > 1 else ["-m"]), module]
    words = [word for job in jobs for word in (*job, BETWEEN)][:-1]
    env = os.environ | (alone if processes == 1 else {})
    done = subprocess.run([*run, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=seconds)
    found: list[list[str]] = [[]]
    for line in done.stdout.splitlines():
        if line.startswith("passed "):
            found[-1].append(line.removeprefix("passed ").strip())
            if found[-1][-1] == "all":
                found.append([])
    assert len(found) == len(jobs) + 1, done.stdout[-2000:] + done.stderr[-6000:]
    return found[:-1]
