"""Time of a kernel from its instructions and bytes: the slowest of a GPU's units, everything else overlapping.

```python
cycles = max(I / 128, alu / A, (fma + imad) / F, (mufu + cvt / 2) / 16, wavefronts)     # a value, of a multiprocessor
time   = max(cycles / (SM * GHz), bytes / bandwidth)                                    # ns
```
I: all instructions a value. Integer operations, comparisons and selections run at half the rate (A = 64 lanes), the
special function unit has 16, and the load unit passes one wavefront of 128 bytes a cycle; a gather from a table, where
each lane has an address, counts as three. Perfect overlap is assumed: reality is slower, by a tenth or two.
"""

import re
from collections import Counter
from dataclasses import dataclass

from parts.limits.sass import Instruction, by_class


@dataclass(frozen=True)
class Gpu:
    """Multiprocessors, GHz, bytes a ns; fp32 and integer lanes of a multiprocessor. `target`: what it compiles for."""

    target: str
    sms: int
    ghz: float
    bandwidth: float
    fma: int
    alu: int = 64
    special: int = 16


GPUS = {
    "H200": Gpu("cuda:90", 132, 1.755, 4300, 128),
    "H100": Gpu("cuda:90", 132, 1.755, 3350, 128),
    "A100": Gpu("cuda:80", 108, 1.41, 1940, 64),
    "4090": Gpu("cuda:89", 128, 2.52, 1008, 128),
}


@dataclass(frozen=True)
class Work:
    """What one thread of a kernel has to do.

    Args:
        values: of one thread; of a loop, in one trip.
        least: bytes a value that must be moved.
        moved: bytes a value that are moved, with those of a pass before it.
        loop: whether the kernel is its loop.
    """

    values: float
    least: float
    moved: float
    loop: bool = False


def wavefronts(operations: Counter[str]) -> float:
    """Cycles of the load unit, in wavefronts of 128 bytes for each of the operations of one warp."""
    total = 0.0
    for name, count in operations.items():
        if Instruction("", name, "").kind != "memory":
            continue
        width = int(found[1]) if (found := re.search(r"\.(?:U|S)?(8|16|64|128)(?:\.|$)", name)) else 32
        if name.startswith("SHFL"):
            each = 1.0
        elif name.startswith(("LDS", "STS")):
            each = max(1.0, width / 32)
        elif name.startswith("LDG") and width in (32, 64):
            each = 3.0  # of a table, an address a lane; what lies together is loaded 128 bits at a time
        else:
            each = max(1.0, width / 32)
        total += count * each
    return total


def nanoseconds(operations: Counter[str], work: Work, gpu: Gpu) -> dict[str, float]:
    """ns a value by unit, and of `memory` what the bytes take: the largest of all is the kernel's time."""
    kinds = by_class(operations)
    cycles = {
        "issue": sum(kinds.values()) / 128,
        "alu": kinds["alu"] / gpu.alu,
        "fma": (kinds["fma"] + kinds["imad"]) / gpu.fma,
        "special": (kinds["mufu"] + kinds["cvt"] / 2) / gpu.special,
        "load": wavefronts(operations) / 32,
    }
    units = {unit: count / work.values / (gpu.sms * gpu.ghz) for unit, count in cycles.items()}
    return units | {"memory": work.moved / gpu.bandwidth}


def over_floor(operations: Counter[str], work: Work, gpu: Gpu) -> float:
    """Modelled time over the time that memory takes for the least bytes; 0 for what need not be moved at all."""
    floor = work.least / gpu.bandwidth
    return max(nanoseconds(operations, work, gpu).values()) / floor if floor else 0.0
