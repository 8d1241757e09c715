"""Lion's step, fused: gradient, weight and momentum in any 8-bit codec, read once and written once."""

from hf_lowmem.kernels.lion.cases import lion_cases
from hf_lowmem.kernels.lion.reference import lion_step
from hf_lowmem.kernels.registry import Kernel
from hf_lowmem.kernels.step.cases import alone

__all__ = ["LION_STEP"]

LION_STEP = Kernel(
    name="lion_step",
    reference=lion_step,
    triton="hf_lowmem.kernels.lion.triton:lion_step",
    cpu="hf_lowmem.kernels.lion.cpu:lion_step",
    mutates=("params", "skipped", "corrections", "first"),
    cases=lion_cases,
    parts=alone,
)
