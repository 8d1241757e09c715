"""Formats of a saved activation: as it is, as E4M3 in groups of 128, or as int8 in groups of 32.

An activation lives from the forward pass to the backward pass of one step, so, unlike an optimizer's state
(hf_lowmem/codecs), it is written once and read once, keeps the dtype that it came in, and may have any strides. What
counts is bytes per value, the error of one round trip, and that encoding costs little beside the matrix product that
made it.

    e4m3   1 + 2/128 bytes a value; relative error 2.6 % rms however far the values spread: residual, gate, up
    int8   1 + 2/32  bytes a value; 0.55 % on normal data, but one step size for a group: q, k, v, attention output

Groups run along the last dimension, the one that a linear layer sums over: a token never shares a scale with another,
so a shard of the tokens is encoded as the whole would be. A scale per tensor or per row would save the last 1.6 or
6 %; with a few channels 60 times larger than the rest, as trained models have them, a row-wise int8 loses the small
ones, while groups confine the damage to the neighbours.

The scale is largest / top (top: 448 or 127) *rounded up to bf16 before anything is encoded with it*. The scale then
has no error of its own, and because it is rounded up, nothing saturates. This matters to stochastic rounding: with
the nearest bf16, half of all groups would have their largest value cut down, a bias.

The work is done by hf_lowmem/kernels/quantize: on a GPU one pass of a Triton kernel, elsewhere plain torch, with the
same bits. Random bits are a hash of (seed, index of the value), not drawn from a generator: no global state is read or
moved, and every kernel can have the same ones.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lowmem.kernels.exact import e4m3_codes, random_bits
from hf_lowmem.kernels.quantize import DEQUANTIZE, GROUPS, QUANTIZE, Groups
from hf_lowmem.specs import check_choice

__all__ = ["FORMATS", "Format", "check_format", "compress", "decompress", "e4m3_codes", "nbytes", "random_bits"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Format(ABC):
    """One way to store an activation. `compress` and `decompress` below check their arguments and pick one by name."""

    @abstractmethod
    def compress(self, x: Tensor, seed: int | None) -> tuple[Tensor, ...]: ...

    @abstractmethod
    def decompress(self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor: ...

    @abstractmethod
    def nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int: ...


class Identity(Format):
    """`none`: the tensor itself is kept. Nothing is copied, so it must not be changed in place meanwhile."""

    def compress(self, x: Tensor, seed: int | None) -> tuple[Tensor, ...]:
        return (x,)

    def decompress(self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return parts[0].view(shape).to(dtype)

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        return math.prod(shape) * dtype.itemsize


@dataclass(frozen=True)
class Grouped(Groups, Format):
    """`e4m3`, `int8`: a code a value and a bf16 scale a group. Formula and errors: kernels/quantize/reference.py."""

    def compress(self, x: Tensor, seed: int | None) -> tuple[Tensor, ...]:
        # An operator's integers have 64 bits and a sign; the keys of the random bits depend on the lower 64 alone.
        return QUANTIZE(x, self.name, seed if seed is None or -(2**63) <= seed < 2**63 else _wrap(seed))

    def decompress(self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        codes, scales = parts
        return DEQUANTIZE(codes.view(tuple(shape)), scales, self.name, dtype)

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        last = shape[-1] if len(shape) else 1
        return math.prod(shape) + torch.bfloat16.itemsize * math.prod(shape[:-1]) * self.groups(last)


def _wrap(seed: int) -> int:
    """The int64 with the bits of a seed modulo 2**64."""
    return (seed + 2**63) % 2**64 - 2**63


FORMATS: dict[str, Format] = {
    "none": Identity(),
    **{name: Grouped(**vars(groups)) for name, groups in GROUPS.items()},
}


def check_format(label: str, fmt: str) -> str:
    """Raise TypeError or ValueError, naming `label`, unless `fmt` is a name of FORMATS."""
    check_choice(label, fmt, FORMATS)
    return fmt


@torch.no_grad()
def compress(x: Tensor, fmt: str, *, seed: int | None = None) -> tuple[Tensor, ...]:
    """x as (codes, scales), or as (x,) with "none".

        parts = compress(x, "e4m3")                             # x: (..., d), bf16, fp16, fp32 or fp64, any strides
        y = decompress(parts, "e4m3", x.shape, x.dtype)

    codes: uint8 or int8 of x's shape; scales: bf16 (..., ceil(d / group)); contiguous both, without a graph.

    `seed`: stochastic rounding, whose error has mean zero: dW = gᵀx of a linear layer then has no bias from its saved
    input (arXiv 2605.01255), for an error 1.4 times larger. A fresh seed for every tensor and step, from the same
    place that other random streams come from; equal seeds give equal bits. Without it, to the nearest, ties to even.

    fp64 is encoded in fp32: beyond fp32's range it is an inf. Strides that cannot be flattened cost a passing copy.

    Raises TypeError if x is not of these dtypes ("none" takes every one), ValueError if `fmt` is not in FORMATS.
    """
    if fmt not in FORMATS:
        check_format("fmt", fmt)
    if fmt != "none" and x.dtype not in DTYPES:
        raise TypeError(
            f"x of dtype {x.dtype} cannot be stored as {fmt}: only bf16, fp16, fp32 and fp64 values can be. "
            "Keep integers, masks and 8-bit floats with fmt='none'."
        )
    return FORMATS[fmt].compress(x, seed)


@torch.no_grad()
def decompress(parts: Sequence[Tensor], fmt: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Values stored by `compress`, in x's shape and any dtype: a fresh contiguous tensor, with "none" x itself."""
    return FORMATS[fmt].decompress(parts, shape, dtype)


def nbytes(shape: Sequence[int], fmt: str, dtype: torch.dtype) -> int:
    """Bytes that `compress` keeps of an x of that shape and dtype."""
    return FORMATS[fmt].nbytes(shape, dtype)
