"""The peak by both of its sources, and the thread that samples one of them."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from hf_lowmem.memory import PeakMemory, measure_peak

HANGS = 600  # seconds that no machine is too busy for: what is waited for comes at once, or never


def test_peak_sees_a_short_lived_allocation():
    size = 64 * 2**20
    with measure_peak("cpu", interval=0.001) as peak:
        block = torch.ones(size, dtype=torch.uint8)
        inside = peak.added
        del block
    assert peak.source == "process RSS, sampled"
    # Resident are whole pages, and the allocator may round up; other pages of the process may come and go.
    assert inside >= 0.9 * size
    assert peak.added >= inside
    assert peak.peak == peak.start + peak.added
    frozen, block = peak.peak, torch.ones(2 * size, dtype=torch.uint8)
    assert peak.peak == frozen
    del block


def test_peak_is_sampled_by_its_thread_and_the_thread_ends():
    size, name = 64 * 2**20, "hf_lowmem-rss"
    before = threading.active_count()
    with PeakMemory("cpu", interval=0.001) as peak:
        assert threading.active_count() == before + 1
        block = torch.ones(size, dtype=torch.uint8)
        deadline = time.monotonic() + HANGS
        while peak._seen - peak.start < 0.9 * size and time.monotonic() < deadline:
            time.sleep(0.01)  # nobody asks for peak.peak: the thread alone sees it
        assert peak._seen - peak.start >= 0.9 * size
        del block
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join(HANGS)
    assert threading.active_count() == before


def test_a_forgotten_peak_stops_sampling():
    peak = PeakMemory("cpu", interval=0.001).__enter__()
    (thread,) = [t for t in threading.enumerate() if t.name == "hf_lowmem-rss"]
    del peak
    thread.join(HANGS)
    assert not thread.is_alive()


def test_peak_starts_afresh_each_time():
    peak = measure_peak("cpu")
    with peak:
        block = torch.ones(64 * 2**20, dtype=torch.uint8)
        first = peak.peak
        del block
    with peak:
        pass
    assert peak.peak < first


def test_peak_refuses_an_interval_of_nothing():
    with pytest.raises(ValueError, match="interval=0 must be above 0"):
        measure_peak("cpu", interval=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_peaks_are_exact_and_nest():
    with measure_peak() as outer:
        block = torch.empty(2**22, dtype=torch.uint8, device="cuda")
        del block
        with measure_peak() as inner:
            block = torch.empty(2**21, dtype=torch.uint8, device="cuda")
            del block
    assert outer.source == inner.source == "cuda allocator"
    assert (outer.added, inner.added) == (2**22, 2**21)


def test_nested_cuda_peaks_keep_what_was_seen(monkeypatch):
    now = SimpleNamespace(allocated=0, highest=0)

    def use(n: int) -> None:
        now.highest = max(now.highest, n)

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: now.highest)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: now.allocated)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(now, "highest", 0))
    with PeakMemory("cuda") as outer:
        use(700)
        with PeakMemory("cuda") as inner:
            use(300)
        use(400)
    use(9000)
    assert outer.source == "cuda allocator"
    assert (inner.peak, outer.peak) == (300, 700)
