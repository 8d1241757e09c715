"""Adam's step, fused: gradient, weight and both moments in any 8-bit codec, read once and written once."""

from hf_lowmem.kernels.adamw.cases import adamw_cases
from hf_lowmem.kernels.adamw.reference import adamw_step
from hf_lowmem.kernels.registry import Kernel
from hf_lowmem.kernels.step.cases import alone

__all__ = ["ADAMW_STEP"]

ADAMW_STEP = Kernel(
    name="adamw_step",
    reference=adamw_step,
    triton="hf_lowmem.kernels.adamw.triton:adamw_step",
    cpu="hf_lowmem.kernels.adamw.cpu:adamw_step",
    mutates=("params", "skipped", "corrections", "first", "second"),
    cases=adamw_cases,
    parts=alone,
)
