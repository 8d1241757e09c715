"""Random numbers that a module draws, seen from the state of the generators before and after its call.

Neither a class nor a name tells: DropPath, adapters with `rank_dropout`, a noisy activation draw without any
nn.Dropout. What tells is that a generator's state has moved. The CPU's generator and that of the input's device are
watched; a state is read without waiting for the device. What is drawn from Python's or NumPy's generators is not seen.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["Draws", "undrawn"]

# How to read a generator's state, how to set it, and the state.
_Read = tuple[Callable[[], Tensor], Callable[[Tensor], Any], bytes]


class Draws:
    """The states of the generators as they were when it was made.

    seen: False where states cannot be read (a CUDA graph is being captured): then nothing is known.
    """

    def __init__(self, device: torch.device) -> None:
        cpu = torch.default_generator
        self.states: list[_Read] = [(cpu.get_state, cpu.set_state, _bytes(cpu.get_state()))]
        self.seen = True
        if device.type == "cuda":
            gpus, index = torch.cuda.default_generators, device.index or 0
            if index < len(gpus):  # fake tensors are on devices that there are not
                self.seen = not torch.cuda.is_current_stream_capturing()
                if self.seen:
                    gpu = gpus[index]
                    self.states.append((gpu.get_state, gpu.set_state, _bytes(gpu.get_state())))
        elif device.type not in ("cpu", "meta"):
            self.states += _of_other(device)

    def settle(self) -> bool:
        """Whether a generator has moved since. Only the states of those that have are kept."""
        self.states = [state for state in self.states if state[2] != _bytes(state[0]())]
        return bool(self.states)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Draw the same numbers once more; afterwards the generators stand where they stood."""
        now = [(write, read()) for read, write, _ in self.states]
        for _, write, state in self.states:
            write(torch.frombuffer(bytearray(state), dtype=torch.uint8))
        try:
            yield
        finally:
            for write, state in now:
                write(state)


def _of_other(device: torch.device) -> list[_Read]:
    module = torch.get_device_module(device)
    if not hasattr(module, "get_rng_state"):
        return []

    def read() -> Tensor:
        return module.get_rng_state(device)

    return [(read, lambda state: module.set_rng_state(state, device), _bytes(read()))]


def _bytes(state: Tensor) -> bytes:
    # By address, because a mode for fake tensors would take every operator on a real one for a mistake.
    return ctypes.string_at(state.data_ptr(), state.numel())


@contextlib.contextmanager
def undrawn(device: torch.device) -> Iterator[Draws]:
    """Let a module be tried without moving the user's generators."""
    draws = Draws(device)
    with draws.again():
        yield draws
