"""Memory of a device that a process may still take, as the driver or the system says it."""

import re
from pathlib import Path

import torch

__all__ = ["free_and_total"]


def free_and_total(device: torch.device) -> tuple[int | None, int | None]:
    """Bytes that are free on a GPU or in the machine's RAM, and all; None where nobody says it (no Linux, no CUDA)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    if device.type != "cpu":
        return None, None
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return None, None
    found = {name: int(size) * 1024 for name, size in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    return found.get("MemAvailable"), found.get("MemTotal")
