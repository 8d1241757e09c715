"""Operands of an 8-bit matrix product in plain torch: codes with one scale a row, or one a column.

The codes of a row are those of hf_lowmem/kernels/quantize with the row for a group: scale, rounding and error are
described there. Two things come on top. A *factor* for each value of the other axis is multiplied in before anything is
encoded, which is how the scales of one operand get into another (see hf_lowmem/matmul/products.py). And codes are
handed out *turned*, as a matrix whose rows are the columns, since a GPU's 8-bit product reads both of its operands
along the axis that it sums over. That axis must be a multiple of 16 long: turned codes are padded with zeros to one.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_lowmem.kernels.exact import e4m3_halves
from hf_lowmem.kernels.quantize.reference import GROUPS, Groups
from hf_lowmem.kernels.spans import spans

__all__ = ["ALIGNED", "LAYOUTS", "check_layout", "code_columns", "code_rows", "padded", "product", "turn"]

ALIGNED = 16  # values: what CUDA's 8-bit products want of the lengths of rows
INT8_ROWS = 17  # what its int8 product wants of the number of them
LAYOUTS = ("rows", "turned", "both")


def padded(length: int) -> int:
    """The next multiple of 16."""
    return -(-length // ALIGNED) * ALIGNED


def code_rows(
    x: Tensor, factor: Tensor | None, largest: Tensor | None, fmt: str, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of x (M, K), times factor (K,) if there is one, with a scale for each row.

    ```python
    v = x.float() * factor
    scale = bf16_up(max |v| of the row / top);  codes = round(clamp(v * (1 / scale)))
    ```
    Args:
        x: bf16, fp16 or fp32, of any strides.
        factor: fp32.
        largest: fp32, one number: taken for the largest |v| of every row, so that all rows have one scale.
        fmt: a name of GROUPS.
        layout: "rows", "turned" or "both": which codes are made.

    Returns:
        codes (M, K), turned codes (K, M padded to a multiple of 16), each without values where it was not asked for;
        scales (M,), fp32 with the bits of a bf16.
    """
    groups, m = GROUPS[fmt], x.shape[0]
    codes, turned, scales = empty_rows(x, fmt, layout)
    dtype = x.dtype if factor is None else torch.float32
    for rows in _row_spans(x):
        v = x[rows].to(torch.float32)
        if factor is not None:
            v = v * factor
        top = v.abs().amax(1) if largest is None else largest.reshape(1).expand(v.shape[0])
        part, scales[rows] = _encode(groups, v, top, dtype)
        if layout != "turned":
            codes[rows] = part
        if layout != "rows":
            turned[:, rows] = part.t()
    if layout != "rows":
        turned[:, m:] = 0
    return codes, turned, scales


def code_columns(x: Tensor, factor: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    """Turned codes (K, M padded) of x (M, K), times factor (M,), and a scale for each column, (K,): as `code_rows`."""
    groups, (m, k) = GROUPS[fmt], x.shape
    turned, scales = empty_columns(x, fmt)
    top = torch.zeros(k, device=x.device)
    for rows in _row_spans(x):
        top = torch.maximum(top, (x[rows].to(torch.float32) * factor[rows, None]).abs().amax(0))
    for rows in _row_spans(x):
        v = x[rows].to(torch.float32) * factor[rows, None]
        codes, scales[:] = _encode(groups, v, top, torch.float32, dim=1)
        turned[:, rows] = codes.t()
    if not m:
        scales.fill_(groups.least)
    turned[:, m:] = 0
    return turned, scales


def _encode(groups: Groups, v: Tensor, top: Tensor, dtype: torch.dtype, *, dim: int = 0) -> tuple[Tensor, Tensor]:
    """Codes of v, fp32, and scales, one for each index of `dim`, of which `top` are the largest magnitudes.

    Codes of a nan or inf are zero.
    """
    scale, finite = groups.scale_of(top.clone(), dtype)
    y = v * scale.reciprocal().unsqueeze(1 - dim)
    codes = groups.encode(y.clamp_(-groups.top, groups.top), None)
    if v.device.type != "cpu" or not finite.all():
        codes.masked_fill_(~finite.unsqueeze(1 - dim), 0)
    return codes, scale


def _row_spans(x: Tensor) -> Iterator[slice]:
    """Slices of whole rows, so that temporaries are as small as one of them."""
    width = max(x.shape[1], 1)
    for start, stop in spans(x.shape[0] * width, width, x.device):
        yield slice(start // width, stop // width)


def empty_rows(x: Tensor, fmt: str, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the results of `code_rows`."""
    (m, k), dtype = x.shape, GROUPS[fmt].code_dtype
    codes = torch.empty((m, k) if layout != "turned" else (0, k), dtype=dtype, device=x.device)
    turned = torch.empty((k, padded(m) if layout != "rows" else 0), dtype=dtype, device=x.device)
    return codes, turned, torch.empty(m, dtype=torch.float32, device=x.device)


def empty_columns(x: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    """Room for the results of `code_columns`."""
    m, k = x.shape
    turned = torch.empty((k, padded(m)), dtype=GROUPS[fmt].code_dtype, device=x.device)
    return turned, torch.empty(k, dtype=torch.float32, device=x.device)


def turn(codes: Tensor) -> Tensor:
    """Turned codes of codes (M, K): what `code_rows` makes of their values with the layout "turned"."""
    return F.pad(codes.t(), (0, padded(codes.shape[0]) - codes.shape[0])).contiguous()


def check_layout(a: Tensor, b: Tensor) -> None:
    """Raise ValueError where CUDA could not multiply the codes a (M, K) and b (N, K). A CPU takes more; so it is asked
    on every device."""
    (m, k), n = a.shape, b.shape[0]
    if not a.is_contiguous() or not b.is_contiguous():
        raise ValueError(f"codes of shapes {(m, k)} and {tuple(b.shape)} are not contiguous, which CUDA wants of both.")
    if k % ALIGNED or n % ALIGNED or b.shape[1] != k:
        raise ValueError(
            f"codes of shapes {(m, k)} and {tuple(b.shape)}: CUDA multiplies rows of one length, a multiple of 16, and "
            "the second must have a multiple of 16 of them."
        )
    if a.dtype == torch.int8 and m < INT8_ROWS:
        raise ValueError(f"int8 codes of shape {(m, k)}: CUDA multiplies {INT8_ROWS} rows or more.")


def product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, fast: bool, dtype: torch.dtype) -> Tensor:
    """(a bᵀ) times a_scale for each row and b_scale for each column, from codes.

    Args:
        a, b: codes (M, K) and (N, K), uint8 of E4M3 or int8; K and N multiples of 16. See `check_layout`.
        a_scale, b_scale: fp32, (M,) and (N,), or one number for all, (1,), both.
        fast: whether the device may sum with fewer bits.
        dtype: of the result. E4M3 products pass through bf16, since CUDA makes no other of rows with scales.
    """
    check_layout(a, b)
    rows, columns = a_scale.view(-1, 1), b_scale.view(1, -1)
    if a.dtype == torch.int8:
        return (torch._int_mm(a, b.t()).to(torch.float32) * rows * columns).to(dtype)
    # 2**-8 and 2**8 of the values, exactly: seven times as fast on a CPU as torch's cast. No code made here is a nan.
    values = e4m3_halves(a, nans=False), e4m3_halves(b, nans=False).mul_(2.0**16)
    return (values[0] @ values[1].t()).mul_(rows).mul_(columns).to(torch.bfloat16).to(dtype)
