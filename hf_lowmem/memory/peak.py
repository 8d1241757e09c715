"""The most memory in use at once: every tensor, temporaries included, and on a CPU the whole process.

Exact is CUDA's allocator alone. Elsewhere a thread samples the resident size of the process: the operating system's own
high-water mark (`getrusage`) is over the whole life of the process, whatever ran before. So no number goes without its
source.
"""

import contextlib
import ctypes
import gc
import os
import sys
import threading
import weakref

import torch

from hf_lowmem.memory.count import human_bytes

__all__ = ["CUDA_SOURCE", "RSS_SOURCE", "PeakMemory", "measure_peak", "resident"]

CUDA_SOURCE = "cuda allocator"
RSS_SOURCE = "process RSS, sampled"


def resident() -> int:
    """Bytes of this process that are in memory."""
    if sys.platform == "linux":
        with open("/proc/self/statm", "rb") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import psutil  # accelerate depends on it

    return psutil.Process().memory_info().rss


def _trim() -> None:
    """Give freed memory back to the system, so that a run does not inherit the garbage of the one before."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # musl has no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)


def _watch(ref: "weakref.ref[PeakMemory]", stop: threading.Event, interval: float) -> None:
    # Only a weak reference: a PeakMemory that an exception left open ends its thread when it is collected.
    while not stop.wait(interval):
        if (peak := ref()) is None:
            return
        peak._see()
        del peak


class PeakMemory:
    """The most memory in use at once while the context is open.

    source: "cuda allocator" (exact, tensors only, this process) or "process RSS, sampled" (the whole process:
            libraries and file pages too, every `interval` seconds, so short peaks are missed). Never compare
            the two, and on a CPU compare `added`, not `peak`.
    start:  bytes in use at entry
    peak:   bytes, so far or, after the context, until its end
    added:  peak - start

    On CUDA, entering resets the allocator's peak statistics; contexts may nest, other code that resets them
    meanwhile hides what was before. Devices without a CUDA (or ROCm) allocator are watched by RSS.

    trim:   first collect garbage and give freed memory back, a few tenths of a second. Without it, what is reused of
            that is missing in `added`
    """

    _open: "weakref.WeakSet[PeakMemory]" = weakref.WeakSet()

    def __init__(
        self, device: torch.device | str | int | None = None, *, interval: float = 0.01, trim: bool = True
    ) -> None:
        if interval <= 0:
            raise ValueError(f"interval={interval} must be above 0: the seconds between two samples")
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.source = CUDA_SOURCE if self.device.type == "cuda" else RSS_SOURCE
        self.start = 0
        self._seen = 0
        self._interval = interval
        self._trim = trim
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._stop.set()

    @property
    def peak(self) -> int:
        """The highest number of bytes that was seen."""
        if not self._stop.is_set():
            self._see()
        return self._seen

    @property
    def added(self) -> int:
        """Bytes of the peak above what there was at the start."""
        return self.peak - self.start

    def _see(self) -> None:
        cuda = self.device.type == "cuda"
        now = torch.cuda.max_memory_allocated(self.device) if cuda else resident()
        with self._lock:
            self._seen = max(self._seen, now)

    def __enter__(self) -> "PeakMemory":
        if self._trim:
            _trim()
        self._stop = threading.Event()
        if self.device.type == "cuda":
            for other in list(PeakMemory._open):
                other._see()
            torch.cuda.reset_peak_memory_stats(self.device)
            self._seen = self.start = torch.cuda.memory_allocated(self.device)
            PeakMemory._open.add(self)
        else:
            self._seen = self.start = resident()
            args = (weakref.ref(self), self._stop, self._interval)
            threading.Thread(target=_watch, args=args, name="hf_lowmem-rss", daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._see()
        self._stop.set()
        PeakMemory._open.discard(self)

    def __repr__(self) -> str:
        return f"PeakMemory({human_bytes(self.peak)}, {self.source})"


def measure_peak(device: torch.device | str | int | None = None, *, interval: float = 0.01) -> PeakMemory:
    """`with measure_peak() as peak: train()`; then `peak.peak`, `peak.added`, `peak.source`. See PeakMemory.

    `device=None` is the current CUDA device where there is one, else this process.
    """
    return PeakMemory(device, interval=interval)
