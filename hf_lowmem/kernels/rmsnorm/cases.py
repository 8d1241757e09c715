"""Arguments on which the implementations of RMSNorm are compared: every dtype, odd sizes, strides, values that bite."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hf_lowmem.kernels.quantize.reference import quantize
from hf_lowmem.kernels.registry import Case

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SEED = 2**61 + 7
# Shape, dtype of x, dtype of the weight. Few rows, as Triton's interpreter needs 0.05 s for one.
SHAPES = (
    ((3, 256), BF16, BF16),
    ((2, 200), FP16, FP16),
    ((2, 384), BF16, FP32),
    ((1, 1), FP32, FP32),
    ((0, 64), BF16, BF16),
)
VARIANTS = ((False, True), (False, False), (True, False))


def values(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Normal values, one channel in eight of them 30 times larger, as trained models have them."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x[..., ::8] *= 30
    return x.to(dtype).to(device)


def weights(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return (1 + 0.3 * torch.randn(n, generator=torch.Generator().manual_seed(1))).to(dtype).to(device)


def forward_cases() -> Iterator[Case]:
    for shape, dtype, weight in SHAPES:
        for plus_one, cast_first in VARIANTS:
            residual = not cast_first

            def args(
                device: torch.device,
                shape=shape, dtype=dtype, weight=weight, plus_one=plus_one, cast_first=cast_first, residual=residual,
            ) -> tuple[Any, ...]:  # fmt: skip
                x, w = values(shape, dtype, device), weights(shape[1], weight, device)
                other = values(shape, dtype, device, 2) if residual else None
                return x, w, other, 1e-5, plus_one, cast_first, SEED if plus_one else None

            name = f"{shape} {dtype} weight {weight}{' 1+w' if plus_one else ''}{' cast first' if cast_first else ''}"
            yield Case(name, args)
    yield Case("rows of a wider matrix", lambda d: (_wide(d), weights(128, BF16, d), None, 1e-6, False, True, None))
    yield Case("zeros, nan and inf", lambda d: (_spoilt(d), weights(256, BF16, d), None, 1e-6, False, True, None))
    yield Case("transposed", lambda d: (_wide(d)[:, :4].T, weights(6, BF16, d), None, 1e-6, False, True, None))


def _wide(device: torch.device) -> Tensor:
    return values((6, 320), BF16, device)[:, 64:192]


def _spoilt(device: torch.device) -> Tensor:
    """Rows of zeros, with a nan, with an inf, of the smallest and of large values."""
    x = values((5, 256), BF16, torch.device("cpu"))
    x[0] = 0
    x[1, 7] = float("nan")
    x[2, 200] = float("inf")
    x[3] *= 2.0**-100
    x[4] *= 2.0**50
    return x.to(device)


def saved(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    codes, scales = quantize(values(shape, dtype, torch.device("cpu")), "e4m3", None)
    return codes.to(device), scales.to(device)


def again_cases() -> Iterator[Case]:
    for shape, dtype, weight in SHAPES:
        for plus_one, cast_first in VARIANTS:

            def args(
                device: torch.device, shape=shape, dtype=dtype, weight=weight, plus_one=plus_one, cast_first=cast_first
            ) -> tuple[Any, ...]:
                w = weights(shape[1], weight, device)
                return *saved(shape, dtype, device), w, 1e-5, plus_one, cast_first, dtype

            name = f"{shape} {dtype} weight {weight}{' 1+w' if plus_one else ''}{' cast first' if cast_first else ''}"
            yield Case(name, args)


def backward_cases() -> Iterator[Case]:
    for shape, dtype, weight in SHAPES:
        for plus_one, total, wanted in ((False, False, True), (True, True, True), (False, True, False)):

            def args(
                device: torch.device,
                shape=shape, dtype=dtype, weight=weight, plus_one=plus_one, total=total, wanted=wanted,
            ) -> tuple[Any, ...]:  # fmt: skip
                dy, w = values(shape, dtype, device, 3), weights(shape[1], weight, device)
                extra = values(shape, dtype, device, 4) if total else None
                return dy, *saved(shape, dtype, device), w, extra, 1e-5, plus_one, dtype, wanted

            name = f"{shape} {dtype} weight {weight}{' 1+w' if plus_one else ''}{' total' if total else ''}"
            yield Case(f"{name}{'' if wanted else ', no dw'}", args)

    def expanded(device: torch.device) -> tuple[Any, ...]:
        """A gradient with stride 0, like that of a sum: one value under every index."""
        dy = torch.ones((), dtype=BF16, device=device).expand(2, 256)
        return dy, *saved((2, 256), BF16, device), weights(256, BF16, device), None, 1e-5, False, BF16, True

    def parts(device: torch.device) -> tuple[Any, ...]:
        """Three parts of eight rows, the last of them short."""
        dy, w = values((19, 40), FP32, device, 3), weights(40, FP32, device)
        return dy, *saved((19, 40), FP32, device), w, None, 1e-5, False, FP32, True

    yield Case("three parts", parts)
    yield Case("expanded gradient", expanded)
