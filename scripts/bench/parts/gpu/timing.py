"""Timing on a device: events around repeated calls; on a CPU, where only that it runs is shown, the clock."""

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


def device_and_host(
    call: Callable[[], Any], device: torch.device, *, repeats: int, warm_up: int = 2
) -> tuple[float, float]:
    """(seconds on the device, seconds of the host) a call.

    Events stand around all calls together, so that the device is never behind where the host is fast enough. The
    host's are those until the last call was handed over: where the two are equal, the host is what is waited for.
    """
    for _ in range(warm_up):
        call()
    if device.type != "cuda":
        seconds = seconds_of(call, device, repeats=repeats, warm_up=0)
        return seconds, seconds
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    host = (time.perf_counter() - began) / repeats
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3 / repeats, host


def cold_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of a call that finds nothing of its inputs in the L2, which is flushed before each.

    Flushing also lets the host run ahead: of short kernels, the device is measured and not the launch.
    """
    if device.type != "cuda":
        return seconds_of(call, device, repeats=1, warm_up=0)
    from triton.testing import do_bench

    milliseconds = do_bench(call, warmup=15, rep=60, quantiles=[0.5])
    assert isinstance(milliseconds, float)
    return milliseconds / 1e3


def copy_bandwidth(device: torch.device, nbytes: int) -> float:
    """Bytes a second, read and written, of a device-to-device copy: the roofline of everything that is memory-bound."""
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / seconds_of(lambda: target.copy_(source), device, repeats=20)


def free(device: torch.device) -> None:
    """Give memory back, so that the next case has none of this one's. Nothing on a CPU, where no peak is read."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Most bytes of tensors since `free`; None where no allocator counts."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def reserved_bytes(device: torch.device) -> int | None:
    """Most bytes that the caching allocator held since `free`; None where there is none."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
