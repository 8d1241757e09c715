"""Arguments on which the two implementations are compared: every dtype, odd sizes, strides and values that bite."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hf_lowmem.kernels.quantize.reference import GROUPS, quantize
from hf_lowmem.kernels.registry import Case

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def values(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal values over 40 binades, with zeros of both signs among them."""
    g = torch.Generator().manual_seed(math.prod(shape))
    x = torch.randn(shape, generator=g) * torch.exp2(40 * torch.rand(shape, generator=g) - 30)
    return torch.where(torch.rand(shape, generator=g) < 0.1, x * 0, x).to(dtype).to(device)


def extremes(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows of groups: the largest values, denormals, zeros, and each with a nan, an inf or a -inf in it."""
    info = torch.finfo(dtype)
    g = torch.Generator().manual_seed(0)
    x = torch.rand((8, 128), generator=g, dtype=torch.float64) * 2 - 1
    x[:2] *= info.max
    x[2:4] *= info.smallest_normal * 8
    x[4] = 0
    x = x.to(dtype)
    x[1, 3], x[3, 40], x[4, 9], x[5, 127] = math.nan, math.inf, -math.inf, -math.nan
    return x.to(device)


def tensors() -> dict[str, Callable[[torch.device], Tensor]]:
    bf16 = torch.bfloat16
    found: dict[str, Callable[[torch.device], Tensor]] = {}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        found[f"{name} 5x384"] = lambda d, t=dtype: values((5, 384), t, d)
        found[f"{name} extremes"] = lambda d, t=dtype: extremes(t, d)
    for shape in ((), (1,), (7,), (0, 7), (4, 0), (3, 33), (2, 3, 257), (2, 17, 96)):
        found[f"shape {shape}"] = lambda d, s=shape: values(s, bf16, d)
    found["transposed"] = lambda d: values((256, 6), bf16, d).T
    found["heads"] = lambda d: values((2, 5, 3, 64), bf16, d).transpose(1, 2)
    found["columns of a wider one"] = lambda d: values((2, 9, 512), bf16, d)[..., 128:384]
    found["every other column"] = lambda d: values((3, 512), bf16, d)[:, ::2]
    found["expanded"] = lambda d: values((1, 256), bf16, d).expand(4, 256)
    return found


def quantize_cases() -> Iterator[Case]:
    for fmt in GROUPS:
        for seed in (None, 2**62 + 12345):
            for name, make in tensors().items():

                def args(device: torch.device, make=make, fmt=fmt, seed=seed) -> tuple[Any, ...]:
                    return make(device), fmt, seed

                yield Case(f"{fmt} {'nearest' if seed is None else 'stochastic'} {name}", args)


def dequantize_cases() -> Iterator[Case]:
    for fmt in GROUPS:
        for dtype in DTYPES:
            for name, make in tensors().items():

                def args(device: torch.device, make=make, fmt=fmt, dtype=dtype) -> tuple[Any, ...]:
                    return *quantize(make(device), fmt, None), fmt, dtype

                if dtype is torch.bfloat16 or "5x384" in name:
                    yield Case(f"{fmt} to {dtype} from {name}", args)
        yield Case(f"{fmt} every code", lambda device, fmt=fmt: every_code(fmt, device))


def every_code(fmt: str, device: torch.device) -> tuple[Any, ...]:
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(GROUPS[fmt].code_dtype)
    scales = torch.tensor([2.0**-117, 0.012329, 1.0, 1e30] * 2, dtype=torch.bfloat16, device=device)
    rows = codes.expand(3, 256).contiguous()
    return rows, scales[: rows.shape[1] // GROUPS[fmt].group].expand(3, -1).contiguous(), fmt, torch.float32
