"""Cases of the two kernels: pairs of codecs × shapes with whole tiles and ragged ones; flags that are set and not."""

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_lowmem.kernels.registry import Case
from hf_lowmem.kernels.step.cases import PAIRS, state_of

SHAPES = ((37, 5), (5, 410), (2, 32, 64))
COUNT = 3


def _arguments(
    shape: tuple[int, ...], pair: tuple[str, str], device: torch.device
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], str, str]:
    """Gradients, flags, the second of which is not set, moments, codecs; the last gradient has an infinite square."""
    generator = torch.Generator().manual_seed(sum(shape))
    projected = torch.randn((COUNT, *shape), generator=generator) * 0.1
    projected[-1].view(-1)[3] = 1e25
    first, second = (
        [part for _ in range(COUNT) for part in state_of(shape, codec, signed, device)]
        for codec, signed in zip(pair, (True, False), strict=True)
    )
    finite = torch.tensor([1, 0, 1], dtype=torch.int32)
    return projected.to(device), finite.to(device), first, second, *pair


def _of_each() -> Iterator[tuple[str, tuple[int, ...], tuple[str, str]]]:
    for pair in PAIRS:
        for shape in SHAPES:
            yield f"{'x'.join(map(str, shape))}-{','.join(pair)}", shape, pair


def direction_cases() -> Iterator[Case]:
    for label, shape, pair in _of_each():
        yield Case(label, lambda d, s=shape, p=pair: (*_arguments(s, p, d), 0.9, 0.999, 1e-6))


def moments_cases() -> Iterator[Case]:
    def make(device: torch.device, shape: tuple[int, ...], pair: tuple[str, str]) -> tuple[object, ...]:
        args = _arguments(shape, pair, device)
        args[1][-1] = 0  # such a step is not taken
        seeds = [] if set(pair) == {"fp32"} else [11 + 2**37 * i for i in range(COUNT)]
        return (*args, seeds, 0.9, 0.999)

    for label, shape, pair in _of_each():
        yield Case(label, lambda d, s=shape, p=pair: make(d, s, p))
