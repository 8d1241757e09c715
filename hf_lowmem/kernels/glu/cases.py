"""Arguments on which the implementations of gated units are compared: dtypes, odd sizes, halves of one matrix."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hf_lowmem.kernels.glu.reference import ACTIVATIONS
from hf_lowmem.kernels.quantize.reference import quantize
from hf_lowmem.kernels.registry import Case

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SEED = 2**60 + 11
SHAPES = (((5, 256), BF16), ((3, 200), FP16), ((9, 64), FP32), ((1, 1), BF16), ((0, 128), BF16), ((17, 130), BF16))


def values(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Random values with magnitudes from about 1e-4 to 100: both tails of an activation, and its middle."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * torch.exp2(14 * torch.rand(shape, generator=g) - 10)
    return x.to(dtype).to(device)


def pair(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    return values(shape, dtype, device), values(shape, dtype, device, 1)


def halves(device: torch.device) -> tuple[Tensor, Tensor]:
    """Gate and up as the halves of one projection's output."""
    gate, up = values((6, 384), BF16, device).chunk(2, -1)
    return gate, up


def spoilt(device: torch.device) -> tuple[Tensor, Tensor]:
    """Gates at and beyond the ends of the exponential, infinite and nan."""
    ends = [0.0, -0.0, 85.9, 86.1, 88.3, 88.8, 200.0, 1e4, 1e30, 3e38, math.inf, math.nan, 31.9, 32.1, 5.0, 1e-30]
    row = torch.tensor([*ends, *(-x for x in ends)])
    gate = torch.cat([row.repeat(4).view(1, 128), torch.ones(1, 128)])
    return gate.to(BF16).to(device), torch.ones(2, 128, dtype=BF16, device=device)


def inputs() -> dict[str, Any]:
    found: dict[str, Any] = {f"{s} {t}": lambda d, s=s, t=t: pair(s, t, d) for s, t in SHAPES}
    found["halves"] = halves
    found["ends, nan and inf"] = spoilt
    found["transposed"] = lambda d: tuple(t.T for t in pair((128, 6), BF16, d))
    return found


def save_cases() -> Iterator[Case]:
    for act in ACTIVATIONS:
        for name, make in inputs().items():
            seeds = (SEED, SEED + 1) if act == "silu" else (None, None)
            yield Case(f"{act} {name}", lambda d, make=make, act=act, seeds=seeds: (*make(d), act, *seeds))
    yield Case("stochastic gate alone", lambda d: (*pair((5, 256), BF16, d), "silu", SEED, None))


def saved(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes of both, scales of both."""
    (gate_codes, gate_scales), (up_codes, up_scales) = (quantize(t, "e4m3", None) for t in (gate, up))
    return gate_codes, up_codes, gate_scales, up_scales


def glu_cases() -> Iterator[Case]:
    for act in ACTIVATIONS:
        for name, make in inputs().items():

            def plain(device: torch.device, make=make, act=act) -> tuple[Any, ...]:
                gate, up = make(device)
                return gate, up, None, None, act, gate.dtype

            def coded(device: torch.device, make=make, act=act) -> tuple[Any, ...]:
                gate, up = make(device)
                return *saved(gate, up), act, gate.dtype

            yield Case(f"{act} {name}", plain)
            yield Case(f"{act} {name} saved", coded)


def backward_cases() -> Iterator[Case]:
    for case in glu_cases():

        def args(device: torch.device, case=case) -> tuple[Any, ...]:
            gate, *rest = case.make(device)
            return values(tuple(gate.shape), rest[-1], device, 2), gate, *rest

        yield Case(case.name, args)

    def expanded(device: torch.device) -> tuple[Any, ...]:
        gate, up = pair((4, 256), BF16, device)
        return torch.ones((), dtype=BF16, device=device).expand(4, 256), *saved(gate, up), "silu", BF16

    yield Case("expanded gradient", expanded)
