"""Memory over one training step of a real run: what was in use at the edges of its layers.

Weights, gradients and the optimizer's state are counted at each point. What is in use beside them, saved activations
and temporaries, is the rest of what CUDA's allocator has handed out; on a CPU, of what the process has grown by since
the step began, so that Python and its libraries are left out. A CPU's figures are coarse: an allocator keeps small
pieces that were freed.

A point behind each layer in the forward pass comes from the hooks of `hf_lowmem.memory.forward`, one in the backward
pass from a hook on the tensor that the layer has made, which goes with the graph: nothing is left on a model. Of a
window of several micro-batches the last one is kept.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from hf_lowmem.memory import gradient_bytes, optimizer_bytes, parameter_bytes
from hf_lowmem.memory.count import tensors_in
from hf_lowmem.memory.peak import CUDA_SOURCE, RSS_SOURCE, resident
from hf_lowmem.runs.parts import STATIC

__all__ = ["BACKWARD", "FIGURES", "FORWARD", "STEP", "Point", "StepTimeline", "phase_ticks", "rest_of"]

FORWARD, BACKWARD, STEP = "forward", "backward", "optimizer step"
FIGURES = ("in_use", *STATIC)
MOST = 1000  # points of a step that are kept
NARROW = 0.09  # of a picture's width: nearer than that, two names overlap
Point = dict[str, str | int]


class StepTimeline:
    """Points of the step that is measured now.

    Attributes:
        points: {"phase", "module", "in_use", "weights", "gradients", "optimizer"} each, in bytes.
        source: what `in_use` was asked of.
    """

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.source: str | None = None
        self._on = False

    def __getstate__(self) -> dict[str, object]:
        # A copy does not measure on: a model is not the copy's.
        return {"points": self.points, "source": self.source, "_on": False}

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer | None, device: torch.device) -> None:
        """Begin with the step that is under way, at its first or at another micro-batch."""
        self._model, self._optimizer, self._device, self.points = model, optimizer, device, []
        self._layers = {id(layer): name for name, layer in layers_of(model)}
        self._weights, self._states = parameter_bytes(model), (-1, 0)
        self._on, self.source = True, CUDA_SOURCE if device.type == "cuda" else RSS_SOURCE
        self._start = 0
        if self.source == RSS_SOURCE:
            self._start = self._taken() - sum(self._counted().values())
        self.mark(FORWARD, "")

    def after(self, module: nn.Module, args: object, output: object) -> None:
        """Mark that a layer's forward has ended; to be called behind every module's."""
        name = self._layers.get(id(module)) if self._on else None
        if name is None:
            return
        self.mark(FORWARD, name)
        made = next((t for t in tensors_in(output) if t.requires_grad), None)
        if made is not None:
            made.register_hook(lambda grad: self.mark(BACKWARD, name))

    def mark(self, phase: str, module: str) -> None:
        """Note what is in use now."""
        if self._on and len(self.points) < MOST:
            self.points.append({"phase": phase, "module": module, "in_use": self._taken(), **self._counted()})

    def end(self) -> None:
        """Leave model and optimizer alone from here on."""
        if self._on:
            self._on = False
            del self._model, self._optimizer, self._layers

    def _counted(self) -> dict[str, int]:
        if self._optimizer is not None and (count := len(self._optimizer.state)) != self._states[0]:
            self._states = count, optimizer_bytes(self._optimizer)  # which takes time, and changes with their number
        gradients = gradient_bytes(self._model)
        return {"weights": self._weights, "gradients": gradients, "optimizer": self._states[1]}

    def _taken(self) -> int:
        if self.source == CUDA_SOURCE:
            return torch.cuda.memory_allocated(self._device)
        return resident() - self._start


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers of a model by name: what stands in its outermost lists of modules."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    for name in outer:
        for i, layer in enumerate(model.get_submodule(name).children()):
            yield f"{name}.{i}", layer


def rest_of(point: Mapping[str, str | int]) -> int:
    """Bytes of a point beside what is counted: saved activations and temporaries."""
    return max(0, int(point["in_use"]) - sum(int(point[name]) for name in STATIC))


def phase_ticks(phases: Sequence[str]) -> list[tuple[float, str]]:
    """The middle of each run of equal phases, and its name; where names would overlap, that of the longer run."""
    runs: list[tuple[int, int]] = []
    for i, phase in enumerate(phases):
        if i and phase == phases[i - 1]:
            runs[-1] = (runs[-1][0], i)
        else:
            runs.append((i, i))
    found: list[tuple[float, str]] = []
    for first, last in sorted(runs, key=lambda run: run[0] - run[1]):  # the widest first
        middle, room = (first + last) / 2, NARROW * max(len(phases) - 1, 1)
        if all(abs(middle - place) >= room for place, _ in found):
            found.append((middle, phases[first]))
    return sorted(found)
