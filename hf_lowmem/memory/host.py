"""Memory of the host that a device copies from and to: how much there may be, and pages that stay where they are."""

import mmap
import os
import weakref

import torch
from torch import Tensor

from hf_lowmem.memory.count import human_bytes
from hf_lowmem.memory.free import free_bytes

__all__ = ["PAGE", "SHARE", "buffer_of", "check_host"]

SHARE = 0.8  # of the host's available memory that may be taken
PAGE = mmap.PAGESIZE


def buffer_of(nbytes: int, device: torch.device, field: str) -> Tensor:
    """Host memory for copies from and to a device, which `field` asks for.

    Raises:
        RuntimeError: where it cannot be pinned.
    """
    if device.type != "cuda":
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    room = torch.empty(nbytes + 2 * PAGE, dtype=torch.uint8, device="cpu")  # pages that no other buffer has a part of
    first = -room.data_ptr() % PAGE
    buffer = room[first : first + nbytes]
    if nbytes:
        runtime = torch.cuda.cudart()
        assert runtime is not None
        if (error := int(runtime.cudaHostRegister(buffer.data_ptr(), -(-nbytes // PAGE) * PAGE, 0))) != 0:
            raise RuntimeError(
                f"{field}: {human_bytes(nbytes)} of host memory could not be pinned (CUDA error "
                f"{error}). Raise the limit of locked memory (ulimit -l), or leave lowmem_offload unset."
            )
        weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr()).atexit = False
    return buffer


def check_host(missing: int, field: str, what: str, remedy: str) -> None:
    """Raise ValueError where the host lacks memory for so many bytes more, in each of this host's processes.

    Args:
        missing: bytes.
        field: that asks for it, as it is set.
        what: needs it.
        remedy: a sentence, without its end.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    available = free_bytes(torch.device("cpu"))
    if missing * processes > SHARE * available:
        each = f" in each of {processes} processes" if processes > 1 else ""
        raise ValueError(
            f"{field}: {what} need {human_bytes(missing)} of host memory{each} beside what they have; "
            f"{human_bytes(available)} are available, of which {SHARE:.0%} may be taken. {remedy}."
        )
