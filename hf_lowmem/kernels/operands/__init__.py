"""Operands of 8-bit matrix products: codes with one scale a row or a column, straight and turned in one pass.

    codes, turned, scales = CODE_ROWS(x, factor, None, "e4m3", "both")
    turned, scales = CODE_COLUMNS(x, factor, "e4m3")
    y = PRODUCT(codes, others, scales, their_scales, True, torch.bfloat16)

The formula is in reference.py; what is multiplied with what, in hf_lowmem/matmul/products.py.
"""

import torch
from torch import Tensor

from hf_lowmem.kernels.operands import reference
from hf_lowmem.kernels.operands.cases import column_cases, product_cases, row_cases
from hf_lowmem.kernels.operands.reference import ALIGNED, INT8_ROWS, turn
from hf_lowmem.kernels.registry import Kernel

__all__ = ["ALIGNED", "CODE_COLUMNS", "CODE_ROWS", "FLOATS", "INT8_ROWS", "PRODUCT", "turn"]

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def _rows_fake(
    x: Tensor, factor: Tensor | None, largest: Tensor | None, fmt: str, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.empty_rows(x, fmt, layout)


def _columns_fake(x: Tensor, factor: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    return reference.empty_columns(x, fmt)


def _product_fake(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, fast: bool, dtype: torch.dtype) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)


def _product_bound(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, fast: bool, dtype: torch.dtype
) -> list[Tensor | float]:
    """Sums of int8 are exact, and what follows them is rounded alike. Of E4M3, tensor cores add with as few as 13 bits
    below the largest of a block, which NVIDIA does not specify, and the result is rounded to bf16 on either side: 2**-7
    of the sum of magnitudes is twice what both need, and far less than a wrong scale or layout makes."""
    if a.dtype == torch.int8:
        return [0.0]
    sizes = [t.cpu().view(torch.float8_e4m3fn).double().abs() for t in (a, b)]
    return [2.0**-7 * (sizes[0] @ sizes[1].t()) * a_scale.cpu().view(-1, 1) * b_scale.cpu().view(1, -1)]


def _unsupported(x: Tensor, *_: object) -> str:
    return "" if x.dtype in FLOATS else f"it takes bf16, fp16 and fp32, and there is {x.dtype}"


CODE_ROWS = Kernel(
    name="code_rows",
    reference=reference.code_rows,
    triton="hf_lowmem.kernels.operands.triton:code_rows",
    fake=_rows_fake,
    supports=_unsupported,
    cases=row_cases,
)
CODE_COLUMNS = Kernel(
    name="code_columns",
    reference=reference.code_columns,
    triton="hf_lowmem.kernels.operands.triton:code_columns",
    fake=_columns_fake,
    supports=_unsupported,
    cases=column_cases,
)
PRODUCT = Kernel(
    name="product_of_codes",
    reference=reference.product,
    triton="hf_lowmem.kernels.operands.triton:product",
    fake=_product_fake,
    cases=product_cases,
    bound=_product_bound,
)
