"""Cases of APOLLO's kernels: channels by row, by column and one for all, batches, odd sizes, stores, bad gradients.

Each has three matrices: the gradient of the second is too large in one place, that of the third has a nan.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hf_lowmem.kernels.apollo import reference
from hf_lowmem.kernels.registry import Case
from hf_lowmem.kernels.step.cases import skips_of

SHAPES = ((37, 19), (19, 37), (24, 256), (3, 20, 33), (130, 130), (2, 6, 34))
RANK = 5
COUNT = 3
REACH = 1e3


def _matrices(
    shape: tuple[int, ...], dtype: torch.dtype, per_channel: bool, device: torch.device
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients, projections, Adam's directions, flags; the last norms, of a limited growth, or there was none."""
    generator = torch.Generator().manual_seed(sum(shape))
    size = torch.Size(shape)
    grads = torch.randn((COUNT, *shape), generator=generator) * 1e-2
    grads[1].view(-1)[2], grads[2].view(-1)[-1] = -2e15, float("nan")
    smaller = [COUNT, *shape]
    smaller[reference.channel_dim(size)] = RANK if per_channel else 1
    projected, direction = (torch.randn(smaller, generator=generator) for _ in range(2))
    projected[..., 0, :] = 0  # a channel without a gradient
    last = torch.full((COUNT, *shape[:-2]), 0.0 if shape[0] == 24 else 0.5)
    finite = torch.ones(COUNT, dtype=torch.int32)
    return (
        [g.to(dtype).to(device) for g in grads.unbind()],
        (projected * 1e-2).to(device),
        direction.to(device),
        finite.to(device),
        [t.clone().to(device) for t in last.unbind()],
    )


def factor_cases() -> Iterator[Case]:
    for shape in SHAPES:
        for per_channel, dtype in ((True, torch.float32), (False, torch.bfloat16)):
            label = f"{'x'.join(map(str, shape))}-{'channels' if per_channel else 'matrix'}-{dtype}"

            def make(d: torch.device, s: Any = shape, c: Any = per_channel, t: Any = dtype) -> tuple[Any, ...]:
                return (*_matrices(s, t, c, d), c, REACH)

            yield Case(label.replace("torch.", ""), make)


def step_cases() -> Iterator[Case]:
    def make(device: torch.device, shape: tuple[int, ...], per_channel: bool, store: str) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(2)
        dtype = torch.float32 if store == "fp32" else torch.bfloat16
        grads, projected, direction, finite, last = _matrices(shape, dtype, per_channel, torch.device("cpu"))
        found = reference.apollo_factors(grads, projected, direction, finite, last, per_channel, REACH)
        params = [torch.randn(shape, generator=generator).to(dtype) for _ in grads]
        fine = [torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8) for _ in grads]
        lists = params, grads, fine if store == "bf16_ecc" else []
        seeds = [2**41 + 3 + i for i in range(COUNT)] if store in ("bf16_sr", "bf16_ecc") else []
        return (
            *([t.to(device) for t in each] for each in lists),
            finite.to(device),
            skips_of(device),
            [t.to(device) for t in last],
            *(t.to(device) for t in found),
            seeds,
            [3, 4, 1000],
            32.0,
            1e-2,
            0.9,
            0.999,
            0.1,
        )

    for shape, stores in zip(
        SHAPES, (("keep", "fp32"), ("bf16_sr",), ("bf16_ecc",), ("bf16_sr",), ("keep",), ("bf16_sr",)), strict=True
    ):
        for per_channel in (True, False):
            for store in stores:
                label = f"{'x'.join(map(str, shape))}-{'channels' if per_channel else 'matrix'}-{store}"
                yield Case(label, lambda d, a=shape, b=per_channel, c=store: make(d, a, b, c))
