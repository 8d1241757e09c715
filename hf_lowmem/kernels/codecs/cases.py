"""Shared arguments of the codec kernels: every codec, both kinds of state, odd sizes, hostile values, any strides."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hf_lowmem.kernels.codecs import reference
from hf_lowmem.kernels.registry import Case

SIZES = (0, 1, 63, 65, 257, 1500)


def values(numel: int, signed: bool, device: torch.device) -> Tensor:
    """Magnitudes over the whole of fp32, some of them zero, denormal or huge; every 300 of another size."""
    generator = torch.Generator().manual_seed(numel)
    normal = torch.randn(numel, generator=generator)
    x = normal * torch.exp2(torch.randn(numel, generator=generator) * 4)
    kinds = (1.0, 1e-12, 3e-42, 1e32, 0.0)
    x = x * torch.tensor(kinds).repeat_interleave(300)[torch.arange(numel) % (300 * len(kinds))]
    x = torch.where(torch.rand(numel, generator=generator) < 0.05, 0.0, x)
    return (x if signed else x.abs()).to(device)


def room(codec: str, shape: torch.Size, signed: bool, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Codes and scalars that are full of what nobody would write: nan where there is one."""
    rows = reference.CODECS[codec]
    count = -(-shape.numel() // rows.block)
    scalars = [
        torch.full((count,), float("nan") if d.is_floating_point else 77, dtype=d, device=device)
        for d in rows.scalars[signed]
    ]
    return torch.full(shape, 0x80, dtype=torch.uint8, device=device), scalars


def _both(make: Callable[[Tensor, str, bool], tuple[Any, ...]]) -> Iterator[Case]:
    for codec in reference.CODECS:
        for signed in (True, False):
            for numel in SIZES:
                label = f"{codec}-{'signed' if signed else 'unsigned'}-{numel}"
                yield Case(label, lambda d, c=codec, s=signed, n=numel: make(values(n, s, d), c, s))
            yield Case(
                f"{codec}-{'signed' if signed else 'unsigned'}-strided",
                lambda d, c=codec, s=signed: make(values(2 * 33 * 20, s, d).view(33, 40)[:, ::2].T, c, s),
            )


def encode_cases() -> Iterator[Case]:
    """To the nearest, and at random: from the first value of a parameter on, and from beyond the range of an index."""
    for label, seed, offset in (("nearest", None, 0), ("random", 2**40 + 4, 0), ("random-part", 77, 2**33 - 2**7)):

        def make(x: Tensor, codec: str, signed: bool, seed: int | None = seed, offset: int = offset) -> tuple[Any, ...]:
            return (x, *room(codec, x.shape, signed, x.device), codec, signed, seed, offset)

        for case in _both(make):
            if offset == 0 or case.name.endswith(("-257", "strided")):
                yield Case(f"{case.name}-{label}", case.make)


def decode_cases() -> Iterator[Case]:
    def make(x: Tensor, codec: str, signed: bool) -> tuple[Any, ...]:
        codes, scalars = room(codec, x.shape, signed, x.device)
        reference.encode_state(x, codes, scalars, codec, signed, None, 0)
        return codes, scalars, codec, signed

    return _both(make)
