"""Kernels: each is a reference in plain torch and a Triton implementation that gives the same bits.

`KERNELS` is the one table, name → Kernel. Tests, benchmarks and ahead-of-time compilation go over it.
"""

from hf_lowmem.kernels.adamw import ADAMW_STEP
from hf_lowmem.kernels.apollo import APOLLO_FACTORS, APOLLO_STEP
from hf_lowmem.kernels.codecs import DECODE_STATE, ENCODE_STATE
from hf_lowmem.kernels.glu import GLU, GLU_BACKWARD, GLU_SAVE
from hf_lowmem.kernels.lion import LION_STEP
from hf_lowmem.kernels.moments import ADAM_DIRECTION, ADAM_MOMENTS
from hf_lowmem.kernels.operands import CODE_COLUMNS, CODE_ROWS, PRODUCT
from hf_lowmem.kernels.quantize import DEQUANTIZE, QUANTIZE
from hf_lowmem.kernels.registry import Case, Kernel, current_impl, use_kernels
from hf_lowmem.kernels.rmsnorm import RMSNORM, RMSNORM_AGAIN, RMSNORM_BACKWARD

KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        QUANTIZE,
        DEQUANTIZE,
        CODE_ROWS,
        CODE_COLUMNS,
        PRODUCT,
        RMSNORM,
        RMSNORM_AGAIN,
        RMSNORM_BACKWARD,
        GLU_SAVE,
        GLU,
        GLU_BACKWARD,
        ENCODE_STATE,
        DECODE_STATE,
        ADAMW_STEP,
        LION_STEP,
        ADAM_DIRECTION,
        ADAM_MOMENTS,
        APOLLO_FACTORS,
        APOLLO_STEP,
    )
}

__all__ = ["KERNELS", "Case", "Kernel", "current_impl", "use_kernels"]
