"""Step proofs: what no interpreter can show, over all values that there are.

Kernels promise the reference's bits. In Triton's interpreter an operation is numpy's; on a device it is the hardware's
conversion, reciprocal and root. Here each is compared with integers or with float64 over every mantissa, or over every
float: a quotient or root of float64, rounded to fp32, is the correctly rounded one, as its 53 bits are
more than 2 * 24 + 1.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from hf_lowmem.kernels._device import from_bits, reciprocal, root_of
from hf_lowmem.kernels._groups import e4m3_nearest
from hf_lowmem.kernels.exact import e4m3_codes
from parts.gpu.steps import Case
from parts.record import Row

BLOCK = 4096
MANTISSAS = 1 << 23
AS_OURS: dict[str, Any] = {"WIDTH": BLOCK, "enable_fp_fusion": False}
EXPONENTS = (27, 64, 100, 126, 127, 128, 160, 200, 250)  # of fp32, with its bias; all that both promise


@triton.jit
def _roots(first, quotients, roots, WIDTH: tl.constexpr):
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    y = from_bits((first + at).to(tl.uint32))
    tl.store(quotients + at, reciprocal(y))
    tl.store(roots + at, root_of(y))


@triton.jit
def _e4m3(first, codes, WIDTH: tl.constexpr):
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    tl.store(codes + at, e4m3_nearest(from_bits(first.to(tl.uint32) + at.to(tl.uint32))).to(tl.uint8))


def quotients_and_roots(device: torch.device, count: int) -> Row:
    """How many of `count` mantissas, at each of several exponents, give another reciprocal or root than float64."""
    quotients, roots = (torch.empty(count, device=device) for _ in range(2))
    wrong = [0, 0]
    for exponent in EXPONENTS:
        first = exponent << 23
        _roots[(count // BLOCK,)](first, quotients, roots, **AS_OURS)
        y = (torch.arange(count, dtype=torch.int32, device=device) + first).view(torch.float32).double()
        wrong[0] += int((quotients != (1 / y).float()).sum())
        wrong[1] += int((roots != y.sqrt().float()).sum())
    return {"values": count * len(EXPONENTS), "differ": sum(wrong), "of": wrong, "wrong": any(wrong)}


def e4m3_of_all_floats(device: torch.device, count: int, step: int) -> Row:
    """How many floats the kernels' conversion to E4M3 codes otherwise than the integers of exact.py do.

    Args:
        count: how many bit patterns beside each other, from every `step`-th of the 256 values of the highest byte.
    """
    codes = torch.empty(count, dtype=torch.uint8, device=device)
    differ = 0
    for high in range(0, 256, step):
        first = (high << 24) - (2**32 if high > 127 else 0)
        _e4m3[(count // BLOCK,)](first, codes, **AS_OURS)
        y = (torch.arange(count, dtype=torch.int64, device=device) + first).to(torch.int32).view(torch.float32)
        inside = y.abs() <= 448  # what a group divided by its scale can be
        differ += int(((codes != e4m3_codes(torch.where(inside, y, 0))) & inside).sum())
    return {"values": count * (256 // step), "differ": differ, "wrong": differ > 0}


def cases(device: torch.device, toy: bool) -> Iterator[Case]:
    count = BLOCK if toy else MANTISSAS
    yield Case({"case": "1 / y and root of y"}, lambda: quotients_and_roots(device, count))
    count, step = (BLOCK, 64) if toy else (1 << 24, 1)
    yield Case({"case": "E4M3 of every float"}, lambda: e4m3_of_all_floats(device, count, step))
