"""RMSNorm, the quantised save of its input, and its backward pass, in plain torch.

    y = x / sqrt(mean(x**2) + eps) * w

What a model's family does otherwise is where it rounds, and what its weight means:

    cast_first               y = w * (x_hat in x's dtype)                   Llama, Qwen, Mistral, Phi-3
    not cast_first           y = (w * x_hat in fp32) in x's dtype           OLMo 2
    not, plus_one            y = ((1 + w) * x_hat in fp32) in x's dtype     Gemma

Saved for the backward pass is x alone, as E4M3 codes with a bf16 scale for 128 values, bit for bit those of
hf_lowmem/kernels/quantize. The reciprocal root is *not* saved: backward holds a whole row anyway, so that its sum of
squares costs no memory traffic, and with the root of the decoded x what comes out is the exact backward pass at that
x. Its error is that of a slightly different input, never of two inputs that do not fit each other: dx is orthogonal to
x_hat, as it should be.

Sums run over pairs, pairs of pairs, and so on (`sum_pairs`): a fixed order that a GPU can follow with any number of
threads, so that both implementations give the same bits. Its error grows with the logarithm of the length.

Sources: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467; the quantised save: COAT, arXiv
2410.19313, section 5.
"""

import torch
from torch import Tensor

from hf_lowmem.kernels.exact import divide, sqrt
from hf_lowmem.kernels.quantize.reference import dequantize, quantize

__all__ = ["normalise", "normalise_backward", "out_dtype", "rmsnorm", "rmsnorm_again", "rmsnorm_backward", "sum_pairs"]

# Into at most so many parts, of at least so many rows, the rows are cut for the weight's gradient, which is summed in
# each, then over the parts. The cut depends on nothing but the shape, or another GPU would add up in another order.
PARTS, LEAST_ROWS = 256, 8


def sum_pairs(x: Tensor, dim: int = -1) -> Tensor:
    """The sum along `dim`, dropping it: neighbours first, then neighbouring sums; zeros fill up to a power of 2."""
    x = x.movedim(dim, -1)
    length = 1 << max(x.shape[-1] - 1, 0).bit_length()
    x = torch.nn.functional.pad(x, (0, length - x.shape[-1]))
    while x.shape[-1] > 1:
        x = x[..., ::2] + x[..., 1::2]
    return x.squeeze(-1)


def parts_of(rows: int) -> tuple[int, int]:
    """Number of parts, and of rows in each (the last may have fewer)."""
    each = max(-(-rows // PARTS), LEAST_ROWS)
    return -(-rows // each), each


def out_dtype(x: torch.dtype, weight: torch.dtype, cast_first: bool) -> torch.dtype:
    return torch.promote_types(x, weight) if cast_first else x


def root(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x**2) + eps) of each row, (M, 1)."""
    square = divide(sum_pairs(x * x).unsqueeze(-1), x.shape[-1]) + eps
    rms = sqrt(square) if square.dtype == torch.float32 else square.sqrt()
    return torch.ones_like(rms) / rms


def normalise(x: Tensor, weight: Tensor, eps: float, plus_one: bool, cast_first: bool, dtype: torch.dtype) -> Tensor:
    """y (M, n) from x (M, n) in fp32 or fp64. `dtype`: x's own, for the rounding of `cast_first` and the output."""
    x_hat = x * root(x, eps)
    if cast_first:
        x_hat = x_hat.to(dtype).to(x.dtype)
    return (x_hat * factor(weight, x.dtype, plus_one)).to(out_dtype(dtype, weight.dtype, cast_first))


def factor(weight: Tensor, dtype: torch.dtype, plus_one: bool) -> Tensor:
    weight = weight.to(dtype)
    return weight + 1.0 if plus_one else weight


def normalise_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> tuple[Tensor, Tensor]:
    """dx (M, n) and dy * x_hat (M, n), whose sum over rows is the weight's gradient. In x's dtype, fp32 or fp64.

    ```python
    g = dy * w
    dx = (g - x_hat * mean(g * x_hat)) / rms
    ```
    """
    r = root(x, eps)
    x_hat = x * r
    g = dy * factor(weight, x.dtype, plus_one)
    mean = divide(sum_pairs(g * x_hat).unsqueeze(-1), x.shape[-1])
    return (g - x_hat * mean) * r, dy * x_hat


def sum_rows(terms: Tensor) -> Tensor:
    """(M, n) -> (n,) in fp32: one row after the other within a part, then over the parts by pairs."""
    count, each = parts_of(terms.shape[0])
    padded = torch.nn.functional.pad(terms, (0, 0, 0, count * each - terms.shape[0])).view(count, each, terms.shape[1])
    total = torch.zeros_like(padded[:, 0])
    for row in range(each):
        total = total + padded[:, row]
    return sum_pairs(total, 0)


def rmsnorm(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, plus_one: bool, cast_first: bool, seed: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The norm of x, or of x + residual, and that input in E4M3.

    x, residual: (M, n), bf16, fp16 or fp32, of one dtype; weight: (n,) of any of these; seed: stochastic rounding of
    the codes. Returns y (M, n), codes uint8 (M, n), scales bf16 (M, ceil(n / 128)), and x + residual (M, n) in x's
    dtype, without a residual an empty tensor.
    """
    x = x.contiguous()
    total = x.new_empty(0) if residual is None else x + residual.contiguous()
    source = x if residual is None else total
    codes, scales = quantize(source, "e4m3", seed)
    return normalise(source.to(torch.float32), weight, eps, plus_one, cast_first, x.dtype), codes, scales, total


def rmsnorm_again(
    codes: Tensor, scales: Tensor, weight: Tensor, eps: float, plus_one: bool, cast_first: bool, dtype: torch.dtype
) -> Tensor:
    """The norm of what was saved: y (M, n). `dtype`: that of the input."""
    return normalise(dequantize(codes, scales, "e4m3", torch.float32), weight, eps, plus_one, cast_first, dtype)


def rmsnorm_backward(
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
    """dx (M, n) in `dtype` and dw (n,) in the weight's, from dy (M, n) and the saved input.

    d_total: the gradient (M, n) of x + residual from elsewhere; it is added. weight_wanted: without it dw is an empty
    tensor, and a pass over memory less. In fp32 throughout, rounded once.
    """
    x = dequantize(codes, scales, "e4m3", torch.float32)
    dx, terms = normalise_backward(dy.contiguous().to(torch.float32), x, weight, eps, plus_one)
    if d_total is not None:
        dx = dx + d_total.contiguous().to(torch.float32)
    dw = sum_rows(terms).to(weight.dtype) if weight_wanted else weight.new_empty(0)
    return dx.to(dtype), dw
