"""Group quantisation of activations: E4M3 in groups of 128, int8 in groups of 32, nearest or stochastic.

The public face is hf_lowmem/activations/formats.py; the formula and its error bounds are in reference.py.
"""

from hf_lowmem.kernels.quantize.cases import dequantize_cases, quantize_cases
from hf_lowmem.kernels.quantize.reference import (
    GROUPS,
    Groups,
    dequantize,
    dequantize_fake,
    quantize,
    quantize_fake,
)
from hf_lowmem.kernels.registry import Kernel

__all__ = ["DEQUANTIZE", "GROUPS", "QUANTIZE", "Groups"]

QUANTIZE = Kernel(
    name="quantize",
    reference=quantize,
    triton="hf_lowmem.kernels.quantize.triton:quantize",
    cpu="hf_lowmem.kernels.quantize.cpu:quantize",
    fake=quantize_fake,
    cases=quantize_cases,
)
DEQUANTIZE = Kernel(
    name="dequantize",
    reference=dequantize,
    triton="hf_lowmem.kernels.quantize.triton:dequantize",
    cpu="hf_lowmem.kernels.quantize.cpu:dequantize",
    fake=dequantize_fake,
    cases=dequantize_cases,
)
