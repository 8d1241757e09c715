"""Timing on a device: events around repeated calls, median; on a CPU, the clock."""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def seconds_of(call: Callable[[], Any], device: torch.device, *, repeats: int, warm_up: int = 2) -> float:
    """Median seconds of `call` over `repeats`, after `warm_up` calls that compile and allocate."""
    for _ in range(warm_up):
        call()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        return statistics.median(times)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda.synchronize(device)
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def copy_bandwidth(device: torch.device, nbytes: int) -> float:
    """Bytes a second, read and written, of a device-to-device copy: the roofline of everything that is memory-bound."""
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / seconds_of(lambda: target.copy_(source), device, repeats=20)


def free(device: torch.device) -> None:
    """Give memory back, so that the next case begins with none of this one's."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Most bytes of tensors since `free`; None where no allocator counts."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
