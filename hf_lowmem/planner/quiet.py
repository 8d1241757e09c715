"""A place for a simulated run, which leaves no trace in the process."""

import contextlib
import gc
import logging
import os
import random
import warnings
from collections.abc import Iterator

import numpy
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers.utils import logging as transformers_logging

__all__ = ["quiet"]

# By what accelerate and torch know that there are other processes, or an engine.
LAUNCHED = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "PMI_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_DEEPSPEED",
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context that leaves no trace of a simulated run: random streams, singletons of accelerate, warnings, log levels.

    Inside, this is one process, whatever launched it; and what was there before is not looked through for garbage, as
    trainers have it done at their start: that takes longer than a step without values.
    """
    states = [AcceleratorState._shared_state, PartialState._shared_state, GradientState._shared_state]
    before = [dict(state) for state in states]
    randoms = random.getstate(), numpy.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    verbosity = transformers_logging.get_verbosity()
    ours = logging.getLogger("hf_lowmem")
    level = ours.level
    launched = {name: value for name in LAUNCHED if (value := os.environ.pop(name, None)) is not None}
    freezes = gc.get_freeze_count() == 0
    if freezes:
        gc.freeze()
    try:
        ours.setLevel(logging.ERROR)
        for state in states:
            state.clear()
        PartialState(cpu=True)
        transformers_logging.set_verbosity_error()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if freezes:
            gc.unfreeze()
        os.environ.update(launched)
        ours.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        for state, values in zip(states, before, strict=True):
            state.clear()
            state.update(values)
        random.setstate(randoms[0])
        numpy.random.set_state(randoms[1])  # noqa: NPY002
        torch.set_rng_state(randoms[2])
