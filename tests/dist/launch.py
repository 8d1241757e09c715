"""Start a worker module on several gloo processes, as torchrun does."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def launch(processes: int, *words: str, module: str = "tests.dist.worker", seconds: int = 3600) -> list[str]:
    """What the worker printed as "passed ...", one entry a line.

    gloo may end a process with "terminate called without an active exception" after everything has passed, so the exit
    code says nothing: "passed all" is the worker's last word.
    """
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m", module]
    done = subprocess.run([*run, *words], cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    passed = [line.removeprefix("passed ").strip() for line in done.stdout.splitlines() if line.startswith("passed ")]
    assert "all" in passed, done.stdout[-2000:] + done.stderr[-6000:]
    return passed
