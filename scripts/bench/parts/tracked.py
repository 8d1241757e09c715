"""Bytes by kind, out of a snapshot of torch's MemTracker."""

from typing import Any

import torch


def total(snapshot: dict[torch.device, dict[Any, int]]) -> dict[str, int]:
    """Bytes by kind over all devices; "Total" is one of the kinds."""
    found: dict[str, int] = {}
    for kinds in snapshot.values():
        for kind, size in kinds.items():
            name = str(getattr(kind, "name", kind))
            found[name] = found.get(name, 0) + size
    return found
