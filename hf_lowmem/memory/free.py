"""Memory that a run may still take: of a GPU, or of this machine's RAM as far as this process is allowed to have it.

A container's limit is often far below the machine's RAM, and the kernel ends whoever passes it; so on a CPU the least
counts of what the machine has available and of what each control group above this process leaves.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

__all__ = ["free_and_total", "free_bytes", "left_by_cgroups"]

GROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
# (limit, in use, what of it is files that can be dropped) of version 2, and of version 1.
FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can still take on a device; what torch holds of a GPU without using it counts as free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil  # accelerate depends on it

    return min([psutil.virtual_memory().available, *left_by_cgroups()])


def free_and_total(device: torch.device) -> tuple[int | None, int | None]:
    """`free_bytes`, and all that the GPU or the machine has; None for a device of another kind, which says nothing."""
    if device.type == "cuda":
        return free_bytes(device), torch.cuda.mem_get_info(device)[1]
    if device.type != "cpu":
        return None, None
    import psutil

    return free_bytes(device), psutil.virtual_memory().total


def left_by_cgroups(groups: Path = GROUPS, own: Path = OWN) -> list[int]:
    """Bytes that each control group with a limit leaves this process; empty where there is none."""
    return [left for folder in _folders(groups, own) for names in FILES if (left := _left(folder, *names)) is not None]


def _folders(groups: Path, own: Path) -> Iterator[Path]:
    """The groups that this process is in, up to the root; in a container the root alone may be seen."""
    yield groups
    yield groups / "memory"
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers in ("", "memory"):
            parts = [part for part in path.split("/") if part not in ("", "..")]
            root = groups / "memory" if controllers else groups
            for n in range(1, len(parts) + 1):
                yield root.joinpath(*parts[:n])


def _left(folder: Path, limit: str, used: str, files: str) -> int | None:
    try:
        most = int((folder / limit).read_text(encoding="utf-8"))  # "max" is no number
        now = int((folder / used).read_text(encoding="utf-8"))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):
        return None
    return max(0, most - now + int(stat.get(files, 0)))
