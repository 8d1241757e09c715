"""Cases of APOLLO's kernels: channels by row, by column and one for all, batches, odd sizes, every store."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hf_lowmem.kernels.apollo import reference
from hf_lowmem.kernels.registry import Case

SHAPES = ((37, 19), (19, 37), (24, 256), (3, 20, 33), (130, 130))
RANK = 5


def _matrices(shape: tuple[int, ...], dtype: torch.dtype, per_channel: bool, device: torch.device) -> list[Tensor]:
    """Gradient, its projection, Adam's direction, the last norm: of a growth that is limited, or there was none."""
    generator = torch.Generator().manual_seed(sum(shape))
    size = torch.Size(shape)
    grad = torch.randn(shape, generator=generator) * 1e-2
    smaller = list(shape)
    smaller[reference.channel_dim(size)] = RANK if per_channel else 1
    projected, direction = (torch.randn(smaller, generator=generator) for _ in range(2))
    projected[..., 0, :] = 0  # a channel without a gradient
    last = torch.full(shape[:-2], 0.0 if shape[0] == 24 else 0.5)
    return [t.to(device) for t in (grad.to(dtype), projected * 1e-2, direction, last)]


def factor_cases() -> Iterator[Case]:
    for shape in SHAPES:
        for per_channel, dtype in ((True, torch.float32), (False, torch.bfloat16)):
            label = f"{'x'.join(map(str, shape))}-{'channels' if per_channel else 'matrix'}-{dtype}"

            def make(d: torch.device, s: Any = shape, c: Any = per_channel, t: Any = dtype) -> tuple[Any, ...]:
                return (*_matrices(s, t, c, d), c)

            yield Case(label.replace("torch.", ""), make)


def step_cases() -> Iterator[Case]:
    def make(
        device: torch.device, shape: tuple[int, ...], per_channel: bool, store: str, finite: bool
    ) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(2)
        dtype = torch.float32 if store == "fp32" else torch.bfloat16
        grad, projected, direction, last = _matrices(shape, dtype, per_channel, torch.device("cpu"))
        s, factor = reference.apollo_factors(grad, projected, direction, last, per_channel)
        param = torch.randn(shape, generator=generator).to(dtype)
        fine = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
        tensors = param, grad, fine if store == "bf16_ecc" else None, torch.tensor(finite), s, factor
        seed = 2**41 + 3 if store in ("bf16_sr", "bf16_ecc") else None
        on_device = (t if t is None else t.to(device) for t in tensors)
        return (*on_device, 32.0, 1e-2, 0.9, 0.999, 0.1, 3, seed)

    for shape, stores in zip(
        SHAPES, (("keep", "fp32"), ("bf16_sr",), ("bf16_ecc",), ("bf16_sr",), ("keep",)), strict=True
    ):
        for per_channel in (True, False):
            for store in stores:
                label = f"{'x'.join(map(str, shape))}-{'channels' if per_channel else 'matrix'}-{store}"
                yield Case(label, lambda d, a=shape, b=per_channel, c=store: make(d, a, b, c, True))
    yield Case("bad", lambda d: make(d, SHAPES[0], True, "bf16_ecc", False))
