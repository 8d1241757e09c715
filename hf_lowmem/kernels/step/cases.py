"""Parameters, gradients and encoded states for the cases of the fused steps, the same on every device."""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from hf_lowmem.kernels.codecs.cases import room, values
from hf_lowmem.kernels.codecs.reference import encode_state
from hf_lowmem.kernels.compare import Case
from hf_lowmem.specs import WEIGHT_STORES

PAIRS = (("fp32", "fp32"), ("int8", "int8"), ("fp8_expand", "fp8_expand"), ("int8_softsign", "fp8_expand"))
# A scalar, an odd size, a matrix with a ragged last block, one of a whole tile.
SHAPES = ((), (7,), (37, 41), (32, 64))
# Two beyond `SMALL` of triton.py, which have a launch each, of the kernel that does nearly all of a real model's step;
# the gradient of the first is bad. Before them two for the shared launch.
LARGE = ((), (7,), (3, 21_850), (65_537,))
PLACE = 2**20 + 6  # of a part's first value in the whole


def state_of(shape: Sequence[int], codec: str, signed: bool, device: torch.device) -> list[Tensor]:
    """An encoded state of a few steps' gradients; zeros among it, but nothing huge or denormal."""
    size = torch.Size(shape)
    value = values(size.numel(), signed, device).view(size)
    value = torch.where((value.abs() > 1e-15) & (value.abs() < 1e3), value, 0.0) * 1e-2
    if codec == "fp32":
        return [value]
    codes, scalars = room(codec, size, signed, device)
    encode_state(value, codes, scalars, codec, signed, None, 0)
    return [codes, *scalars]


def parameters(
    store: str,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    device: torch.device,
    shapes: Sequence[tuple[int, ...]] = (*SHAPES, SHAPES[2]),
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[int]]:
    """Parameters of all shapes with gradients, corrections and seeds; the gradient of the third has a nan."""
    generator = torch.Generator().manual_seed(1)
    params, grads, corrections = [], [], []
    for shape in shapes:
        params.append(torch.randn(shape, generator=generator).to(dtype).to(device))
        grads.append((torch.randn(shape, generator=generator) * 0.1).to(grad_dtype).to(device))
        fine = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
        corrections.append(fine.to(device))
    grads[2].view(-1)[-1] = float("nan")
    seeds = [5 + 2**40 * i for i in range(len(params))] if store != "keep" else []
    return params, grads, corrections if store == "bf16_ecc" else [], seeds


def skips_of(device: torch.device) -> Tensor:
    """A counter of bad gradients that has counted five."""
    return torch.full((), 5, dtype=torch.int64, device=device)


def state_seeds(*codecs: str) -> list[int]:
    """Seeds of the parameters' encoded states; none where nothing is encoded."""
    return [] if set(codecs) == {"fp32"} else [11 + 2**37 * i for i in range(len(SHAPES) + 1)]


def dtypes_and_stores() -> Iterator[tuple[torch.dtype, torch.dtype, str]]:
    """(weights, gradients, store): every store of bf16, and the other dtypes."""
    for store in WEIGHT_STORES:
        yield torch.bfloat16, torch.bfloat16, store
    yield torch.float32, torch.float32, "keep"
    yield torch.bfloat16, torch.float32, "bf16_ecc"
    yield torch.float16, torch.float16, "keep"


def alone(case: Case) -> Iterator[Case]:
    """The last two parameters of a case in a call of their own, whose launches are others; one with the norm known, one
    as a part of a longer parameter, which draws other numbers."""
    yield Case(f"{case.name}, one alone, norm known", lambda device: _only(case.make(device), -2), _norm)
    yield Case(f"{case.name}, one alone", lambda device: (*_only(case.make(device), -1)[:-1], PLACE))


def _norm(args: tuple[object, ...]) -> dict[str, Tensor]:
    """The norm of the only gradient."""
    return {"norm": cast(list[Tensor], args[1])[0].float().norm()}


def _only(args: tuple[object, ...], i: int) -> tuple[object, ...]:
    """Arguments of a step with what belongs to parameter `i` alone: of each list its share."""
    lists = [cast(list[object], a) for a in args if isinstance(a, list)]
    count = len(lists[0])
    shares = iter([a[i % count * (len(a) // count) :][: len(a) // count] for a in lists])
    return tuple(next(shares) if isinstance(a, list) else a for a in args)
