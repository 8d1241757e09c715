"""A fresh process for each run of the demo.

A process keeps what it once allocated: in a shared one, the second run would start from the first one's
resident set, and its peak would be hidden or inflated. So each run is alone. Where the system allows it, the
process is forked from a server that has imported transformers and trl once, and costs no import of its own.
"""

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from typing import Any

import torch

WORKER = "hf_lowmem.demo.worker"


def alone(function: str, *args: Any, **kwargs: Any) -> Any:
    """``hf_lowmem.demo.worker``'s ``function(*args, **kwargs)`` in a fresh process; what it raises is
    raised here.

    By name, because this process never imports the worker: it has no use for trl.
    """
    # Importing the worker may wake CUDA, and a process forked after that could not use it.
    if sys.platform == "linux" and not torch.cuda.is_available():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([WORKER])
    else:
        context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_call, function, args, kwargs).result()


def _call(function: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return getattr(import_module(WORKER), function)(*args, **kwargs)
