"""Uncompressed states: fp32, and bf16, to the nearest or at random."""

from typing import ClassVar

import torch
from torch import Tensor

from hf_lowmem.codecs.base import Encoded
from hf_lowmem.kernels.codecs.dither import Dither
from hf_lowmem.kernels.codecs.weights import round_by_


class FullCodec:
    """`data`: the values themselves in one dtype, 4 or 2 bytes a value.

    bf16 keeps 8 bits of mantissa: rounded to the nearest, an average stops moving once its increment falls under half a
    unit in the last place, 2**-9 of it. Optimizers round it at random, so that the increment arrives on average.
    """

    name: ClassVar[str]
    dtype: ClassVar[torch.dtype]

    def init(self, like: Tensor, *, signed: bool) -> Encoded:
        """Zeros in the codec's dtype."""
        return {"data": torch.zeros(like.shape, dtype=self.dtype, device=like.device)}

    def decode(self, enc: Encoded, shape: torch.Size) -> Tensor:
        """A copy in fp32."""
        return enc["data"].to(torch.float32, copy=True).view(shape)

    def encode_(self, enc: Encoded, value: Tensor, dither: Dither | None = None) -> None:
        """Overwrite the values. Nothing is rounded at random here, so `dither` is not looked at."""
        enc["data"].copy_(value)

    def nbytes(self, numel: int, *, signed: bool) -> int:
        """Bytes of the values: there is nothing beside them."""
        return numel * self.dtype.itemsize


class Fp32Codec(FullCodec):
    """The values as they are."""

    name: ClassVar[str] = "fp32"
    dtype: ClassVar[torch.dtype] = torch.float32


class Bf16Codec(FullCodec):
    """bf16, rounded to nearest or at random, but never from finite to infinite, nor from something to nothing.

    What lies above bf16's largest value takes it. What would round to zero, below 2**-134 = 4.6e-41, takes bf16's
    smallest value, 2**-133, with its sign: a second moment that is not zero never decodes to zero.
    """

    name: ClassVar[str] = "bf16"
    dtype: ClassVar[torch.dtype] = torch.bfloat16

    def encode_(self, enc: Encoded, value: Tensor, dither: Dither | None = None) -> None:
        """Overwrite the values, rounded to the nearest, or at random with `dither`."""
        limits = torch.finfo(self.dtype)
        data = enc["data"]
        if dither is None:
            data.copy_(value)
        else:
            round_by_(dither.words, value, data)
        data.clamp_(-limits.max, limits.max)
        lost = (data == 0) & (value != 0)
        smallest = torch.full_like(data, limits.smallest_normal * limits.eps)
        data.copy_(torch.where(lost, smallest.copysign(value), data))
