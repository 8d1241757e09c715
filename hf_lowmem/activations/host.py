"""Inputs of layers in host memory: between a layer's forward pass and its backward pass the device has none of them.

A copy takes as long as it takes; what counts is that nobody waits for it. Each direction has a stream of its own beside
the computing one, and two places on the device:

    forward    codes of layer i are copied to the host while it runs, and let go when layer i + 1 has made its own
    backward   codes of layer i - 1 are copied back while layer i runs again

The last layer's codes are still there when backward begins, and are not copied back. A place is given up, or written
to, only after the computing stream was told to wait for the copy, so torch's allocator, which knows that stream alone,
never hands out memory that is being copied. Nothing waits on the host.

Host memory is taken once and used again in each step. On CUDA it is registered (pinned) as it was allocated:
torch's own pinned memory is rounded up to a power of two, 8 GiB for 4.1. On a CPU the same code copies to other memory
of the same kind, so that what is computed there is what a device computes; nothing is saved.

Values are copied, so that gradients are equal bit for bit to those without.
"""

import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowmem.memory import host
from hf_lowmem.patching import check_version, version_of

__all__ = ["HostStore", "Kept"]

FIELD = "lowmem_offload='inputs'"
REMEDY = "Take shorter sequences or a smaller batch, or leave lowmem_offload unset"
ALIGNMENT = 64  # bytes: where a tensor may begin in a buffer


class Kept:
    """Tensors in host memory. `get` brings them back, any number of times; the memory is free when this is gone."""

    def __init__(self, store: "HostStore", parts: Sequence[Tensor], before: "Kept | None") -> None:
        sizes = [-(-part.nbytes // ALIGNMENT) * ALIGNMENT for part in parts]
        self.store, self.device = store, parts[0].device
        self.buffer = store.take(sum(sizes), self.device)
        self.host: list[Tensor] = []
        start = 0
        for part, size in zip(parts, sizes, strict=True):
            self.host.append(self.buffer[start : start + part.nbytes].view(part.dtype).view(part.shape))
            start += size
        self.before = None if before is None else weakref.ref(before)

    def get(self) -> tuple[Tensor, ...]:
        """The tensors on their device. What was kept before these is on its way when this returns."""
        return self.store.lane(self.device).get(self)

    def __del__(self) -> None:
        if hasattr(self, "buffer"):
            self.store.give(self.buffer)


class HostStore:
    """Where the layers of a model keep their inputs. A copy of it, or of a model that has it, is empty.

    Args:
        layers: that share it, each of which keeps as much.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.nbytes = 0  # of host memory that was taken, used or not
        self._free: list[Tensor] = []
        self._returned: deque[Tensor] = deque()  # which an object may be that is deleted on any thread, at any time
        self._lanes: dict[torch.device, _Lane] = {}
        self._last: weakref.ref[Kept] | None = None

    def __reduce__(self) -> tuple[type["HostStore"], tuple[int]]:
        return HostStore, (self.layers,)

    @torch.no_grad()
    def put(self, parts: Sequence[Tensor]) -> Kept:
        """Keep contiguous tensors of one device. They must not be changed before the next call.

        Raises:
            ValueError: where the host has not the memory for all layers.
        """
        kept = Kept(self, parts, None if self._last is None else self._last())
        self._last = weakref.ref(kept)
        self.lane(kept.device).put(kept, tuple(part.detach() for part in parts))
        return kept

    def lane(self, device: torch.device) -> "_Lane":
        if device not in self._lanes:
            self._lanes[device] = _Lane(device)
        return self._lanes[device]

    def take(self, nbytes: int, device: torch.device) -> Tensor:
        """A buffer of so many bytes or more: a free one, or a new one in the place of a free one that is too small."""
        while self._returned:
            self._free.append(self._returned.popleft())
        self._free.sort(key=lambda buffer: buffer.nbytes)
        fitting = next((i for i, buffer in enumerate(self._free) if buffer.nbytes >= nbytes), None)
        if fitting is not None:
            return self._free.pop(fitting)
        if self._free:
            for lane in self._lanes.values():
                lane.wait()  # for a copy to it whose tensors were never asked for
            self.nbytes -= self._free.pop().nbytes
        host.check_host(nbytes * self.layers - self.nbytes, FIELD, "the inputs of all layers", REMEDY)
        self.nbytes += nbytes
        return host.buffer_of(nbytes, device, FIELD)

    def give(self, buffer: Tensor) -> None:
        """Take back a buffer of `take`, from whatever thread."""
        self._returned.append(buffer)


class _Near(NamedTuple):
    """Tensors on the device, whose they are, and the event that says that its copy is done; None on a CPU."""

    kept: weakref.ref[Kept]
    parts: tuple[Tensor, ...]
    versions: list[int]
    copied: torch.Event | None


class _Lane:
    """The way between a device and the host: a stream, and what is on the device beside what is in use."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.near: _Near | None = None

    def put(self, kept: Kept, parts: tuple[Tensor, ...]) -> None:
        self.clear()
        self.copy(kept, parts, zip(kept.host, parts, strict=True))

    def get(self, kept: Kept) -> tuple[Tensor, ...]:
        self.fetch(kept)
        parts = self.clear()
        before = None if kept.before is None else kept.before()
        if before is not None:
            before.store.lane(before.device).fetch(before)
        return parts

    @torch.no_grad()
    def fetch(self, kept: Kept) -> None:
        """Begin to copy back what is not there."""
        if self.near is not None and self.near.kept() is kept:
            return
        self.clear()
        parts = tuple(torch.empty_like(host, device=self.device) for host in kept.host)
        self.copy(kept, parts, zip(parts, kept.host, strict=True))

    def copy(self, kept: Kept, parts: tuple[Tensor, ...], pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Copy from the second to the first of each pair. `parts`: those on the device, which are held until then."""
        event = None
        if self.stream is None:
            for target, source in pairs:
                target.copy_(source)
        else:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                for target, source in pairs:
                    target.copy_(source, non_blocking=True)
                event = self.stream.record_event()
        self.near = _Near(weakref.ref(kept), parts, list(map(version_of, parts)), event)

    def clear(self) -> tuple[Tensor, ...]:
        """Take what is near, which is not held from here on. What is computed from now on waits for its copy."""
        if self.near is None:
            return ()
        near, self.near = self.near, None
        for part, version in zip(near.parts, near.versions, strict=True):
            check_version(part, version)
        if near.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(near.copied)
        return near.parts

    def wait(self) -> None:
        """Wait, on the host, for all copies."""
        if self.stream is not None:
            self.stream.synchronize()
