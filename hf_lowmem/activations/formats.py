"""How a saved activation is stored: as it is, as E4M3 in groups of 128, or as int8 in groups of 32.

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

Every step is exact or one correctly rounded fp32 operation, so that each device gives the same bits. E4M3 is made by
integers; on a CPU by torch's cast, bit-equal and 16 times faster where nothing fuses. Random bits are a hash of
(seed, index of the value), not drawn from a generator: no global state is read or moved, and a fused kernel can have
the same ones.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lowmem.codecs.blocks import spans
from hf_lowmem.codecs.fp8 import E4M3_MAX, FLOAT_MAX
from hf_lowmem.codecs.fp8 import to_e4m3 as cast_to_e4m3
from hf_lowmem.specs import check_choice

__all__ = ["FORMATS", "Format", "check_format", "compress", "decompress", "e4m3_codes", "nbytes", "random_bits"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
BF16_MAX = torch.finfo(torch.bfloat16).max
LOW32 = 0xFFFFFFFF
# Two rounds of xor-shift and multiplication; these constants (C. Wellons, hash-prospector, public domain) have the
# lowest known bias for a 32-bit hash of two rounds.
HASH_A, HASH_B = 0x7FEB352D, 0x846CA68B


def _signed(word: int) -> int:
    """The 32-bit word as the int32 of the same bits."""
    return (word ^ 0x80000000) - 0x80000000


def _mix(word: int) -> int:
    word = ((word ^ (word >> 16)) * HASH_A) & LOW32
    word = ((word ^ (word >> 15)) * HASH_B) & LOW32
    return word ^ (word >> 16)


def random_bits(seed: int, start: int, stop: int, device: torch.device) -> Tensor:
    """32 random bits for each index in [start, stop), as int32: a pure function of (seed, index).

    ```python
    k0 = mix(seed_low ^ mix(seed_high ^ 0x9E3779B9)); k1 = mix(k0 ^ 0x85EBCA6B)     # uint32
    h = index ^ k0                                                                  # uint32, wraps
    h = (h ^ (h >> 16)) * 0x7FEB352D + k1
    h = (h ^ (h >> 15)) * 0x846CA68B
    h = h ^ (h >> 16)
    ```
    The second key, added between the rounds, keeps the streams of two seeds from being one stream in another order.
    Indices count modulo 2**32. Good for rounding; not for cryptography.
    """
    k0 = _mix((seed & LOW32) ^ _mix(((seed >> 32) & LOW32) ^ 0x9E3779B9))
    k1 = _mix(k0 ^ 0x85EBCA6B)
    # int32 wraps as uint32 does; its right shift copies the sign, which the mask takes away again.
    h = torch.arange(stop - start, dtype=torch.int32, device=device).add_(_signed(start & LOW32))
    h.bitwise_xor_(_signed(k0))
    h.bitwise_xor_((h >> 16).bitwise_and_(0xFFFF)).mul_(HASH_A).add_(_signed(k1))
    h.bitwise_xor_((h >> 15).bitwise_and_(0x1FFFF)).mul_(_signed(HASH_B))
    return h.bitwise_xor_((h >> 16).bitwise_and_(0xFFFF))


def e4m3_codes(y: Tensor, noise: Tensor | None = None) -> Tensor:
    """fp32 within [-448, 448] -> E4M3 bits as uint8, by integer operations on y's bits; exact on every device.

    Nearest, ties to even: torch's cast for every such y. With `noise` (int32 of random bits), up with the probability
    of the remainder, to 20 bits of it.

    A normal value (>= 2**-6) drops 20 of its 23 bits of mantissa, with a carry into the exponent, which is rebiased
    from 127 to 7. A smaller one is a multiple of 2**-9: adding 1.5 * 2**23 leaves the rounded multiple in the
    lowest bits.
    """
    bits = y.view(torch.int32)
    sign = (bits >> 24).bitwise_and_(0x80)
    bits = bits & 0x7FFFFFFF
    small = bits.view(torch.float32).clamp(max=2.0**-6)
    if noise is None:
        sub = small.mul(2.0**9).add_(1.5 * 2.0**23).view(torch.int32).bitwise_and_(0xFF)
        normal = ((bits >> 20) & 1).add_(bits).add_(0x7FFFF)
    else:
        noise = noise & 0xFFFFF
        sub = small.mul(2.0**29).to(torch.int32).add_(noise).bitwise_right_shift_(20)
        normal = bits + noise
    normal = normal.bitwise_right_shift_(20).sub_((127 - 7) << 3)
    return torch.where(bits < 0x3C800000, sub, normal).bitwise_or_(sign).to(torch.uint8)  # 0x3C800000: 2**-6


def _encode_e4m3(y: Tensor, noise: Tensor | None) -> Tensor:
    if noise is None and y.device.type == "cpu":
        return cast_to_e4m3(y)
    return e4m3_codes(y, noise)


def _decode_e4m3(codes: Tensor, scale: Tensor) -> Tensor:
    """An E4M3 shifted by 7 is an fp16 of 2**-8 its value, subnormals included, and torch widens fp16 exactly.

    Shifting the sign along leaves a copy of it in the exponent's highest bit, which the mask clears.
    """
    halves = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x4001).view(torch.float16)
    return halves.to(torch.float32).mul_(scale.mul(256.0))


def _encode_int8(y: Tensor, noise: Tensor | None) -> Tensor:
    if noise is None:
        return y.round().to(torch.int8)
    # 24 bits after the point: at most 2**31 - 1 in all, and an arithmetic shift rounds down.
    return y.mul(2.0**24).to(torch.int32).add_(noise & 0xFFFFFF).bitwise_right_shift_(24).to(torch.int8)


def _decode_int8(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.to(torch.float32).mul_(scale)


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
class Grouped(Format):
    """A code a value and a bf16 scale a group; groups run along the last dimension.

    ```python
    scale = bf16_up(max(abs(x)) / top)                      # per group; at least `least`
    codes = round(clamp(x / scale, -top, top))              # to E4M3 or to an integer
    x = codes * scale
    ```
    The error of a value x of a group with scale s, in fp32, before the output's dtype rounds once more:

    - e4m3: at most max(|x| / 17, s / 1024), where s <= (1 + 2**-7) largest / 448 (2**-18.8 of the largest);
      an E4M3 has 4 significant bits, so the worst is 17/16 becoming 1, and below 2**-6 steps of 2**-9.
    - int8: at most s / 2 <= (1 + 2**-7) largest / 254.
    - stochastic: less than one step in place of half of one, |x| / 8 or s / 512, and s; the mean is x.

    Measured on normal data, in fp32: a relative error of 2.58 % and 0.55 %; stochastic 3.66 % and 0.77 %. With 8 of
    1,024 channels 60 times larger, over the other channels: 2.59 % and 3.9 %.

    Groups of values below 2**-108 (e4m3) or 2**-119 (int8) lose them gradually, to an error of at most 2**-127: scales
    stop where the smallest code would decode to a denormal, which some devices flush. Above 0.99 of the largest bf16
    or fp16 values saturate, because what is decoded must be finite. A nan or an inf makes its whole group nan, and only
    that.
    """

    group: int
    top: float
    least: float
    code_dtype: torch.dtype
    encode: Callable[[Tensor, Tensor | None], Tensor]
    decode: Callable[[Tensor, Tensor], Tensor]

    def compress(self, x: Tensor, seed: int | None) -> tuple[Tensor, ...]:
        last = x.shape[-1] if x.dim() else 1
        codes = torch.empty(x.shape, dtype=self.code_dtype, device=x.device)
        scales = torch.empty((*x.shape[:-1], self.groups(last)), dtype=torch.bfloat16, device=x.device)
        flat, flat_codes, flat_scales = x.reshape(-1), codes.view(-1), scales.view(-1)
        for start, stop, first in self.spans(flat, last):
            y = self.rows(flat[start:stop].to(torch.float32), last)
            scale = self.scales(y.abs().amax(1), x.dtype)
            y = y.div(scale[:, None]).clamp_(-self.top, self.top)
            noise = None if seed is None else self.rows(random_bits(seed, start, stop, x.device), last)
            flat_codes[start:stop].copy_(self.unpad(self.encode(y, noise), last))
            flat_scales[first : first + scale.shape[0]].copy_(scale)
        return codes, scales

    def decompress(self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        codes, scales = parts
        last = shape[-1] if len(shape) else 1
        out = torch.empty(shape, dtype=dtype, device=codes.device)
        flat, flat_codes, flat_scales = out.view(-1), codes.view(-1), scales.view(-1)
        for start, stop, first in self.spans(flat, last):
            rows = self.rows(flat_codes[start:stop], last)
            scale = flat_scales[first : first + rows.shape[0]].to(torch.float32)
            flat[start:stop].copy_(self.unpad(self.decode(rows, scale[:, None]), last))
        return out

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        last = shape[-1] if len(shape) else 1
        return math.prod(shape) + torch.bfloat16.itemsize * math.prod(shape[:-1]) * self.groups(last)

    def groups(self, last: int) -> int:
        """Groups in a last dimension of that size; a ragged last group has a scale of its own."""
        return -(-last // self.group)

    def scales(self, largest: Tensor, dtype: torch.dtype) -> Tensor:
        """max |x| of each group, fp32 -> its scale, fp32 with the bits of a bf16; nan where that is not finite."""
        mantissa, exponent = math.frexp(min(torch.finfo(dtype).max, BF16_MAX) / self.top)
        most = math.ldexp(math.floor(mantissa * 256), exponent - 8)  # the largest bf16 that decodes to finite values
        bits = largest.div(self.top).clamp_(self.least, most).view(torch.int32)
        # In integers, because a compiler keeps the unrounded fp32 of `x.bfloat16().float()`.
        scale = bits.add_(0xFFFF).bitwise_and_(-0x10000).view(torch.float32)
        return torch.where(largest <= FLOAT_MAX, scale, math.nan)

    def spans(self, flat: Tensor, last: int) -> Iterator[tuple[int, int, int]]:
        """(start, stop, first group) of parts that are whole groups, so temporaries are as small as such a part."""
        ragged = last % self.group
        for start, stop in spans(flat.numel(), last if ragged else self.group, flat.device):
            yield start, stop, start // last * self.groups(last) if ragged else start // self.group

    def rows(self, span: Tensor, last: int) -> Tensor:
        """A span as (groups, group): a view or, if the last group is ragged, a copy padded with zeros."""
        pad = self.groups(last) * self.group - last
        return (
            torch.nn.functional.pad(span.view(-1, last), (0, pad)).view(-1, self.group)
            if pad
            else span.view(-1, self.group)
        )

    def unpad(self, rows: Tensor, last: int) -> Tensor:
        """The inverse of `rows`, flat."""
        width = self.groups(last) * self.group
        return rows.view(-1, width)[:, :last].reshape(-1) if width != last else rows.view(-1)


FORMATS: dict[str, Format] = {
    "none": Identity(),
    "e4m3": Grouped(128, E4M3_MAX, 2.0**-117, torch.uint8, _encode_e4m3, _decode_e4m3),
    "int8": Grouped(32, 127.0, 2.0**-126, torch.int8, _encode_int8, _decode_int8),
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
    Compiled code is specialised to the seed: under torch.compile leave it out.

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
    """What `compress` stored, with x's shape and any dtype: a fresh contiguous tensor, with "none" x itself."""
    return FORMATS[fmt].decompress(parts, shape, dtype)


def nbytes(shape: Sequence[int], fmt: str, dtype: torch.dtype) -> int:
    """Bytes that `compress` keeps of an x of that shape and dtype."""
    return FORMATS[fmt].nbytes(shape, dtype)
