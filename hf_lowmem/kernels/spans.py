"""Long tensors in parts, so that a reference's temporaries are as small as a part.

An expression like `map[lut[bits(x / scale) >> 16]]` makes a temporary at every operator. On whole tensors each of those
is as large as the tensor in fp32, which is the memory that a code of 8 bits exists to save; on a span it is small, and
on a CPU it stays in the cache, which makes the same code two to four times faster.
"""

from collections.abc import Iterator

import torch

# On an accelerator: 64 MiB in fp32, large beside a kernel launch and small beside a model.
ACCELERATOR_SPAN = 1 << 24
# On a CPU, per thread: 512 KiB in fp32. Smaller ones pay for their operators, larger ones leave the second-level cache.
CPU_SPAN_PER_THREAD = 1 << 17


def spans(numel: int, block: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Ranges [start, stop) that cover `numel` values; each starts at a block, a ragged last block is alone.

    Under torch.compile the operators are fused and have no temporaries, so all full blocks are one span.
    """
    whole = numel - numel % block
    step = whole
    if not torch.compiler.is_compiling():
        wanted = CPU_SPAN_PER_THREAD * torch.get_num_threads() if device.type == "cpu" else ACCELERATOR_SPAN
        step = -(-wanted // block) * block
    for start in range(0, whole, max(step, 1)):
        yield start, min(start + step, whole)
    if whole < numel:
        yield whole, numel
