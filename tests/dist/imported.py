"""`python -m` of a test's module, in a fork of one process that has imported torch, transformers and TRL.

Their imports take longer than most of what is tested in processes of their own. One such process serves all tests of a
pytest worker: it computes nothing itself, and ends with the worker, as its input ends.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[2]
PRELOAD = ("torch", "torch.distributed.tensor", "transformers.trainer", "accelerate", "trl", "datasets")


def preload() -> None:
    for name in PRELOAD:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the end of each training collects, and would walk through all that was imported


@functools.cache
def server() -> Any:
    command = [sys.executable, "-m", __name__]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    made = subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True, **pipes)
    atexit.register(made.communicate)  # its input ends, and so does it
    return made


def run_module(
    module: str, words: Sequence[str], env: dict[str, str] | None = None, seconds: int = 3600
) -> subprocess.CompletedProcess[str]:
    """What `python -m MODULE WORDS` returns and prints, at the root of the repository."""
    serving = server()
    with TemporaryDirectory() as folder:
        files = [f"{folder}/{name}" for name in ("out", "err")]
        asked = {"module": module, "words": list(words), "env": env or dict(os.environ), "files": files}
        late = threading.Timer(seconds, os.killpg, (serving.pid, signal.SIGKILL))
        late.start()
        print(json.dumps(asked), file=serving.stdin, flush=True)
        status = serving.stdout.readline()
        late.cancel()
        out, err = (Path(file).read_text() if Path(file).exists() else "" for file in files)
    assert status, f"{module} took more than {seconds} s, or the process that it was forked from ended: {err[-3000:]}"
    return subprocess.CompletedProcess([module, *words], int(status), out, err)


def become(asked: dict[str, Any]) -> None:
    """In the fork. An exception's traceback and exit status are Python's own."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(asked["files"], start=1):  # appended to, as several processes write
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.argv = [asked["module"], *asked["words"]]
    runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)
    sys.exit(0)


def serve() -> None:
    preload()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            become(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
