"""SwiGLU and GeGLU whose backward pass keeps gate and up in 8 bits, and computes act(gate) and the product again.

    h, *codes = glu_rows(gate, up, "silu", (None, None))    # or "gelu_tanh"; keeps E4M3 codes of both
    h = GLU(gate, up, None, None, "silu", gate.dtype)       # keeps gate and up themselves: they can be had again

torch keeps gate, act(gate), up and the product, and passes over memory a dozen times; this is one pass forward and one
back, with 2 x (1 + 2/128) bytes kept a value.
"""

from typing import Any

import torch
from torch import Tensor

from hf_lowmem.kernels.glu import reference
from hf_lowmem.kernels.glu.cases import backward_cases, glu_cases, save_cases
from hf_lowmem.kernels.glu.reference import ACTIVATIONS
from hf_lowmem.kernels.quantize.reference import GROUPS
from hf_lowmem.kernels.registry import Kernel

__all__ = ["ACTIVATIONS", "GLU", "GLU_BACKWARD", "GLU_SAVE", "glu_rows"]

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def _save_fake(
    gate: Tensor, up: Tensor, act: str, gate_seed: int | None, up_seed: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    return out, *GROUPS["e4m3"].empty(gate), *GROUPS["e4m3"].empty(up)


def _fake(
    gate: Tensor, up: Tensor, gate_scales: Tensor | None, up_scales: Tensor | None, act: str, dtype: torch.dtype
) -> Tensor:
    return torch.empty(gate.shape, dtype=dtype, device=gate.device)


def _backward_fake(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_scales: Tensor | None,
    up_scales: Tensor | None,
    act: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    d_gate, d_up = (torch.empty(gate.shape, dtype=dtype, device=gate.device) for _ in range(2))
    return d_gate, d_up


def _unsupported(*args: Any) -> str:
    floats = (a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point())
    other = next((dtype for dtype in floats if dtype not in FLOATS), None)
    return f"it takes bf16, fp16 and fp32, and there is {other}" if other else ""


GLU_SAVE = Kernel(
    name="glu_save",
    reference=reference.glu_save,
    triton="hf_lowmem.kernels.glu.triton:glu_save",
    cpu="hf_lowmem.kernels.glu.cpu:glu_save",
    fake=_save_fake,
    supports=_unsupported,
    cases=save_cases,
)
GLU = Kernel(
    name="glu",
    reference=reference.glu,
    triton="hf_lowmem.kernels.glu.triton:glu",
    cpu="hf_lowmem.kernels.glu.cpu:glu",
    fake=_fake,
    supports=_unsupported,
    cases=glu_cases,
)
GLU_BACKWARD = Kernel(
    name="glu_backward",
    reference=reference.glu_backward,
    triton="hf_lowmem.kernels.glu.triton:glu_backward",
    cpu="hf_lowmem.kernels.glu.cpu:glu_backward",
    fake=_backward_fake,
    supports=_unsupported,
    cases=backward_cases,
)


def _save_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    gate, _, ctx.act, _, _ = inputs
    _, *saved = output
    ctx.dtype = gate.dtype
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)  # else zeros of their sizes are written in backward, and read by nobody
    ctx.save_for_backward(*saved)


def _save_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None, None, None
    gate, gate_scales, up, up_scales = ctx.saved_tensors
    return *GLU_BACKWARD(grad, gate, up, gate_scales, up_scales, ctx.act, ctx.dtype), None, None, None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, gate_scales, _, ctx.act, ctx.dtype = inputs
    if gate_scales is None:  # codes have no gradient
        ctx.save_for_backward(gate, up)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    gate, up = ctx.saved_tensors
    return *GLU_BACKWARD(grad, gate, up, None, None, ctx.act, ctx.dtype), None, None, None, None


GLU_SAVE.op.register_autograd(_save_backward, setup_context=_save_setup)
GLU.op.register_autograd(_backward, setup_context=_setup)


def glu_rows(
    gate: Tensor, up: Tensor, act: str, seeds: tuple[int | None, int | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """act(gate) * up, rounded as torch rounds it, with codes and scales of gate, and of up. Differentiable in both.

    Args:
        gate, up: (M, F) of one dtype, bf16, fp16 or fp32; rows may be strided, as halves of one matrix are.
        act: "silu" or "gelu_tanh".
        seeds: of gate's and up's codes, for stochastic rounding.

    The activation's relative error is at most 4 * 2**-24 for silu, and (4 + 4 |z|) * 2**-24 for gelu_tanh, as
    z = 2 sqrt(2 / pi) (x + 0.044715 x**3) is rounded before the exponential is taken; then it is rounded to the dtype.
    Backward is that of the decoded gate and up. Not for double backward. The caller has made sure that the arguments
    fit together.
    """
    return GLU_SAVE(gate, up, act, *seeds)
