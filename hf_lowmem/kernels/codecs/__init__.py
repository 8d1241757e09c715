"""Encode and decode of the 8-bit optimizer states: `int8`, `int8_softsign`, `fp8_expand`.

What a codec is, and why these: hf_lowmem/codecs. Here are its two functions, in torch (reference.py) and in Triton
(triton.py), and the tables that both look up (tables.py).
"""

import torch
from torch import Tensor

from hf_lowmem.kernels.codecs import reference
from hf_lowmem.kernels.codecs.cases import decode_cases, encode_cases
from hf_lowmem.kernels.registry import Kernel, current_impl

__all__ = ["DECODE_STATE", "ENCODE_STATE", "LEAST_DECODED", "through_op"]

LEAST_DECODED = 1 << 14  # values: decoding in torch is three operators a span
_TRITON = "hf_lowmem.kernels.codecs.triton"

ENCODE_STATE = Kernel(
    name="encode_state",
    reference=reference.encode_state,
    triton=f"{_TRITON}:encode_state",
    cpu="hf_lowmem.kernels.codecs.cpu:encode_state",
    mutates=("codes", "scalars"),
    cases=encode_cases,
)
DECODE_STATE = Kernel(
    name="decode_state",
    reference=reference.decode_state,
    triton=f"{_TRITON}:decode_state",
    cpu="hf_lowmem.kernels.codecs.cpu:decode_state",
    fake=reference.decode_state_fake,
    cases=decode_cases,
)


def through_op(x: Tensor, least: int = 1 << 8) -> bool:
    """Whether a state's tensors are to pass the operator.

    On a CPU they do so where an implementation is forced, or where one is there and the state has `least` values: an
    operator costs as much as tens of torch's, and what is opaque cannot be fused by a compiler.
    """
    if x.device.type != "cpu":
        return True
    impl = current_impl()
    if torch.compiler.is_compiling() or impl == "reference":
        return False
    return impl != "auto" or (x.numel() >= least and not ENCODE_STATE.unsupported(x))
