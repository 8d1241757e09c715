"""RMSNorm whose backward pass keeps its input in 8 bits: one pass over memory forward, one back.

    y, codes, scales = rmsnorm_rows(x, weight, eps, False, True, None)      # Llama, Qwen, Mistral
    y, codes, scales = rmsnorm_rows(x, weight, eps, True, False, None)      # Gemma

What is kept for backward is the E4M3 codes of the input, 1 + 2/128 bytes a value, and the weight.
"""

from typing import Any

import torch
from torch import Tensor

from hf_lowmem.kernels.quantize.reference import GROUPS
from hf_lowmem.kernels.registry import Kernel
from hf_lowmem.kernels.rmsnorm import reference
from hf_lowmem.kernels.rmsnorm.cases import again_cases, backward_cases, forward_cases

__all__ = ["RMSNORM", "RMSNORM_AGAIN", "RMSNORM_BACKWARD", "rmsnorm_rows"]

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
LONGEST = 16384  # a row is held in registers


def _fake(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, plus_one: bool, cast_first: bool, seed: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = reference.out_dtype(x.dtype, weight.dtype, cast_first)
    total = x.new_empty(0) if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return torch.empty(x.shape, dtype=dtype, device=x.device), *GROUPS["e4m3"].empty(x), total


def _again_fake(
    codes: Tensor, scales: Tensor, weight: Tensor, eps: float, plus_one: bool, cast_first: bool, dtype: torch.dtype
) -> Tensor:
    out = reference.out_dtype(dtype, weight.dtype, cast_first)
    return torch.empty(codes.shape, dtype=out, device=codes.device)


def _backward_fake(
    dy: Tensor,
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    d_total: Tensor | None,
    eps: float,
    plus_one: bool,
    dtype: torch.dtype,
    weight_wanted: bool,
) -> tuple[Tensor, Tensor]:
    dw = torch.empty_like(weight) if weight_wanted else weight.new_empty(0)
    return torch.empty(codes.shape, dtype=dtype, device=codes.device), dw


def _unsupported(*args: Any) -> str:
    """Reason why none of the three kernels takes these arguments, or "". The first tensor is (..., n)."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    if tensors[0].shape[-1] > LONGEST:
        return f"a row has {tensors[0].shape[-1]} values; the kernel holds at most {LONGEST} in registers"
    other = next((t.dtype for t in tensors if t.is_floating_point() and t.dtype not in FLOATS), None)
    return f"it takes bf16, fp16 and fp32, and there is {other}" if other else ""


RMSNORM = Kernel(
    name="rmsnorm",
    reference=reference.rmsnorm,
    triton="hf_lowmem.kernels.rmsnorm.triton:rmsnorm",
    cpu="hf_lowmem.kernels.rmsnorm.cpu:rmsnorm",
    fake=_fake,
    supports=_unsupported,
    cases=forward_cases,
)
RMSNORM_AGAIN = Kernel(
    name="rmsnorm_again",
    reference=reference.rmsnorm_again,
    triton="hf_lowmem.kernels.rmsnorm.triton:rmsnorm_again",
    cpu="hf_lowmem.kernels.rmsnorm.cpu:rmsnorm_again",
    fake=_again_fake,
    supports=_unsupported,
    cases=again_cases,
)
RMSNORM_BACKWARD = Kernel(
    name="rmsnorm_backward",
    reference=reference.rmsnorm_backward,
    triton="hf_lowmem.kernels.rmsnorm.triton:rmsnorm_backward",
    cpu="hf_lowmem.kernels.rmsnorm.cpu:rmsnorm_backward",
    fake=_backward_fake,
    supports=_unsupported,
    cases=backward_cases,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, residual, ctx.eps, ctx.plus_one, _, _ = inputs
    y, codes, scales, total = output
    ctx.dtype, ctx.out, ctx.residual = x.dtype, y.dtype, residual is not None
    ctx.mark_non_differentiable(codes, scales, *(() if ctx.residual else (total,)))
    ctx.set_materialize_grads(False)  # else zeros of their sizes are written in backward, and read by nobody
    ctx.save_for_backward(codes, scales, weight)


def _backward(ctx: Any, dy: Tensor | None, _codes: Any, _scales: Any, d_total: Tensor | None) -> tuple[Any, ...]:
    codes, scales, weight = ctx.saved_tensors
    extra = d_total if ctx.residual else None
    if dy is None:
        if extra is None:
            return None, None, None, None, None, None, None
        dy = torch.zeros(codes.shape, dtype=ctx.out, device=codes.device)
    wanted = ctx.needs_input_grad[1]
    dx, dw = RMSNORM_BACKWARD(dy, codes, scales, weight, extra, ctx.eps, ctx.plus_one, ctx.dtype, wanted)
    return dx, dw if wanted else None, dx if ctx.residual else None, None, None, None, None


RMSNORM.op.register_autograd(_backward, setup_context=_setup)


def rmsnorm_rows(
    x: Tensor, weight: Tensor, eps: float, plus_one: bool, cast_first: bool, seed: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """x / sqrt(mean(x**2) + eps) * weight of each row, with the codes and scales of x. Differentiable in x and weight.

    ```python
    x_hat = x.float() / sqrt(mean(x.float() ** 2) + eps)
    y = weight * x_hat.to(x.dtype) if cast_first else (weight * x_hat).to(x.dtype)      # 1 + weight with plus_one
    ```
    Args:
        x: (M, n) of bf16, fp16 or fp32, n <= 16384 where Triton runs.
        weight: (n,) of any of these. Its gradient is summed in fp32, in one order on every device.
        eps: added to the mean square; the model's.
        plus_one: the weight is stored as its difference from 1 (Gemma).
        cast_first: round x_hat to x's dtype before the weight is multiplied (Llama); the output then has the wider
            dtype of both. Not together with plus_one.
        seed: round the codes stochastically (hf_lowmem.activations.formats says when).

    The forward pass is exact. Backward is that of the decoded input: an error of 2.6 % of each value, rms, as tier
    `fp8` has. Not for double backward. The caller has made sure that the arguments fit together.
    """
    y, codes, scales, _ = RMSNORM(x, weight, None, eps, plus_one, cast_first, seed)
    return y, codes, scales
