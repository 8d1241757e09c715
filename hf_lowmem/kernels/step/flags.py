"""Flags on a device that are set already: one launch makes a thousand, for parameters that are stepped one by one."""

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["fresh_flag"]

AT_ONCE = 1024
_flags: dict[tuple[torch.device, int], Iterator[Tensor]] = {}


def fresh_flag(device: torch.device) -> Tensor:
    """An int32 of 1 that nobody has had. They lie 16 bytes apart, so that all are aligned alike."""
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():  # a replay must set it again
            return torch.ones(1, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream  # another one may not see them filled yet
    flag = next(_flags.get((device, stream), iter(())), None)
    if flag is None:
        fresh = iter(torch.ones((AT_ONCE, 4), dtype=torch.int32, device=device).unbind())
        flag, _flags[device, stream] = next(fresh), fresh
    return flag
