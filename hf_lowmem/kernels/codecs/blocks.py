"""Common part of block codecs: a code of 8 or 4 bits a value, few scalars a block, blocks over the flattened tensor.

A codec is two pure functions on a matrix whose rows are blocks. The loops here cut the flattened tensor into spans of
whole blocks, hand each span over as (rows, block), pad the ragged last block with zeros, and write the result into the
existing tensors.

Codes of 4 bits are packed two a byte, neighbours together: a state of N values has ceil(N / 2) bytes of codes, so its
size still depends on N alone.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_lowmem.kernels.codecs.dither import Dither
from hf_lowmem.kernels.spans import spans

# The largest fp32 pattern, less one: stands for "no non-zero value in this block".
NO_VALUE = 0x7F7FFFFE

EncodeRows = Callable[[Tensor, bool, Tensor | None], tuple[Tensor, ...]]
DecodeRows = Callable[[Tensor, tuple[Tensor, ...], bool], Tensor]


def as_rows(flat: Tensor, block: int) -> Tensor:
    """One span as (rows, block): a view, or for a ragged block a copy padded with zeros."""
    if flat.numel() % block:
        flat = torch.nn.functional.pad(flat, (0, block - flat.numel()))
    return flat.view(-1, block)


def pack_pairs(codes: Tensor) -> Tensor:
    """uint8 codes below 16, flat, of even number -> uint8, half as many: value 2j in the low half of byte j."""
    return codes[1::2].bitwise_left_shift(4).bitwise_or_(codes[::2])


def unpack_pairs(packed: Tensor) -> Tensor:
    """The inverse: uint8, flat -> uint8 codes below 16, twice as many."""
    return torch.stack((packed.bitwise_and(15), packed.bitwise_right_shift(4)), 1).view(-1)


def code_bytes(numel: int, bits: int) -> int:
    return -(-numel * bits // 8)


def encode_blocks(
    value: Tensor,
    codes: Tensor,
    scalars: Sequence[Tensor],
    *,
    rows: EncodeRows,
    block: int,
    signed: bool,
    dither: Dither | None,
    bits: int = 8,
) -> None:
    """Encode `value` (fp32, any strides) over `codes` (uint8) and `scalars` (one value a block), in place.

    `rows(x, signed, words)`: (rows, block) fp32 and random bits for as many, or None to round to the nearest -> uint8
    codes (rows, block), then the scalars (rows,).
    """
    flat, codes = value.reshape(-1), codes.view(-1)
    for start, stop in spans(flat.numel(), block, flat.device):
        words = None if dither is None else as_rows(dither.of_state(start, stop, signed, flat.device), block)
        new_codes, *new_scalars = rows(as_rows(flat[start:stop], block), signed, words)
        new_codes = new_codes.view(-1)
        if bits == 4:
            new_codes = pack_pairs(new_codes)
        first, last = code_bytes(start, bits), code_bytes(stop, bits)
        codes[first:last].copy_(new_codes[: last - first])
        first = start // block
        for old, new in zip(scalars, new_scalars, strict=True):
            old[first : first + new.numel()].copy_(new)


def decode_blocks(
    codes: Tensor,
    scalars: Sequence[Tensor],
    shape: torch.Size,
    *,
    rows: DecodeRows,
    block: int,
    signed: bool,
    bits: int = 8,
) -> Tensor:
    """The values as a fresh contiguous fp32 tensor of `shape`.

    `rows(codes, scalars, signed)`: codes (rows, block) and scalars (rows,) -> a fresh (rows, block) fp32.
    """
    codes = codes.view(-1)
    out = torch.empty(shape.numel(), dtype=torch.float32, device=codes.device)
    for start, stop in spans(out.numel(), block, out.device):
        part = codes[code_bytes(start, bits) : code_bytes(stop, bits)]
        if bits == 4:
            part = unpack_pairs(part)[: stop - start]
        of_span = as_rows(part, block)
        first = start // block
        of_rows = tuple(scalar[first : first + of_span.shape[0]] for scalar in scalars)
        out[start:stop].copy_(rows(of_span, of_rows, signed).view(-1)[: stop - start])
    return out.view(shape)


def smallest_nonzero(magnitude: Tensor) -> Tensor:
    """The smallest non-zero value of each row of a non-negative fp32 (rows, block); huge for a row of zeros.

    In integers, as the bits of non-negative floats have their order: subtracting 1 wraps zero to the far end.
    """
    bits = magnitude.view(torch.int32).sub(1).bitwise_and_(0x7FFFFFFF)
    return bits.amin(1).clamp_(max=NO_VALUE).add_(1).view(torch.float32)


def mark_nonzero(x: Tensor) -> Tensor:
    """1 where a non-negative fp32 is not zero, else 0, as uint8; exact for denormals on every device.

    `maximum(codes, mark_nonzero(x))` is the floor code: code 0 is zero and code 1 the smallest positive
    value. Bits as int32 have the order of non-negative floats, and clamping integers is three times faster
    than `x.ne(0)` on a CPU. A negative x counts as zero.
    """
    return x.view(torch.int32).clamp(0, 1).to(torch.uint8)
