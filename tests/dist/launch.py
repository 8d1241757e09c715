"""Start a worker module on several gloo processes, as torchrun does: see start.py."""

import itertools
import os
import sys
from collections.abc import Callable, Sequence

from tests.dist.imported import run_module

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
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    words = [word for job in jobs for word in (*job, BETWEEN)][:-1]
    if processes > 1:
        done = run_module("tests.dist.start", [str(processes), module, *words], seconds=seconds)
    else:
        done = run_module(module, words, os.environ | alone, seconds)
    found: list[list[str]] = [[]]
    for line in done.stdout.splitlines():
        if line.startswith("passed "):
            found[-1].append(line.removeprefix("passed ").strip())
            if found[-1][-1] == "all":
                found.append([])
    assert len(found) == len(jobs) + 1, done.stdout[-2000:] + done.stderr[-6000:]
    return found[:-1]


def run_jobs(main: Callable[..., None]) -> None:
    """Run what `launch_jobs` has asked of a worker, in each of its processes: `main` with the words of each job."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for _, job in itertools.groupby(sys.argv[1:], key=lambda word: word == BETWEEN):
        if (words := list(job)) != [BETWEEN]:
            main(*words)
    dist.barrier()
    dist.destroy_process_group()
