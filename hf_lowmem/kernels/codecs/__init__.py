"""Encode and decode of the 8-bit optimizer states: `int8`, `int8_softsign`, `fp8_expand`.

What a codec is, and why these: hf_lowmem/codecs. Here are its two functions, in torch (reference.py) and in Triton
(triton.py), and the tables that both look up (tables.py).
"""

import torch
from torch import Tensor

from hf_lowmem.kernels.codecs import reference
from hf_lowmem.kernels.codecs.cases import decode_cases, encode_cases
from hf_lowmem.kernels.registry import Kernel, current_impl

__all__ = ["DECODE_STATE", "ENCODE_STATE", "through_op"]

_TRITON = "hf_lowmem.kernels.codecs.triton"

ENCODE_STATE = Kernel(
    name="encode_state",
    reference=reference.encode_state,
    triton=f"{_TRITON}:encode_state",
    mutates=("codes", "scalars"),
    cases=encode_cases,
)
DECODE_STATE = Kernel(
    name="decode_state",
    reference=reference.decode_state,
    triton=f"{_TRITON}:decode_state",
    fake=reference.decode_state_fake,
    cases=decode_cases,
)


def through_op(x: Tensor) -> bool:
    """Whether a state's tensors are to pass the operator.

    On a CPU they do so only where Triton is forced: an operator costs as much as encoding a few thousand values, and
    what is opaque cannot be fused by a compiler.
    """
    return x.device.type != "cpu" or (not torch.compiler.is_compiling() and current_impl() == "triton")
