"""What the block codecs share: a code of 8 or 4 bits a value, few scalars a block, blocks over the flattened tensor.

A block codec is two pure functions on a matrix whose rows are blocks. `BlockCodec` does the rest: it cuts the
flattened tensor into spans of whole blocks, hands each span over as (rows, block), pads the ragged last block
with zeros, and writes the result into the existing tensors.

Why spans: an expression like `map[lut[bits(x / scale) >> 16]]` makes a temporary at every operator. On whole
tensors each of those is as large as the state in fp32, which is the memory that the codec exists to save;
on a span it is small, and on a CPU it stays in the cache, which makes the same code two to four times
faster.

Codes of 4 bits are packed two a byte, neighbours together: a state of N values has ceil(N / 2) bytes of codes, so its
size still depends on N alone. They have no shape of their own, as a last dimension of odd length has no half.

Signedness is a key of the dict, not a value in it, so it costs no byte and reading it waits for no device:
the first scalar is called `scale` for a signed state and `uscale` for one whose values are all >= 0.
"""

from collections.abc import Callable, Iterator
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from hf_lowmem.codecs.base import Encoded

# A span on an accelerator: 64 MiB in fp32, large beside a kernel launch and small beside a model.
ACCELERATOR_SPAN = 1 << 24
# A span on a CPU, per thread: 512 KiB in fp32. Smaller ones pay for their operators, larger ones leave the
# second-level cache.
CPU_SPAN_PER_THREAD = 1 << 17

BF16_MAX = torch.finfo(torch.bfloat16).max
# The largest fp32 pattern, less one: stands for "no non-zero value in this block".
NO_VALUE = 0x7F7FFFFE


class DeviceTable:
    """A constant that `build` makes on the CPU, copied to each device that asks for it, once.

    A plain dict, because torch.compile reads tensors out of one but ignores functools.cache. Building cannot be
    traced: a codec asks for its tables in `init`, so compiled code finds them there.
    """

    def __init__(self, build: Callable[[], Tensor]):
        self.build = build
        self.built: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """Raises RuntimeError if compiled code is the first to ask."""
        if device not in self.built:
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    f"a codec's table for {device} is first needed inside torch.compile, which cannot build it: "
                    "call the codec's init(), or encode or decode once, on that device before compiling"
                )
            with torch.inference_mode(False), torch.device("cpu"):
                self.built[device] = self.build().to(device)
        return self.built[device]


class ErrorBound(NamedTuple):
    """|decoded - x| <= max(relative * |x|, absolute * largest), `largest` being the largest |x| of x's block.

    A block whose largest |x| is under the codec's `smallest` counts as if it were `smallest`.
    """

    relative: float
    absolute: float


def scale_key(signed: bool) -> str:
    return "scale" if signed else "uscale"


def is_signed(enc: Encoded) -> bool:
    """Whether a block codec's state was made for values of both signs. Reads keys, never a value."""
    return "scale" in enc


def count_blocks(numel: int, block: int) -> int:
    return -(-numel // block)


def spans(numel: int, block: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Ranges [start, stop) that cover `numel` values; each starts at a block, a ragged last block is alone.

    Under torch.compile the operators are fused and have no temporaries, so all full blocks are one span.
    """
    whole = numel - numel % block
    step = whole
    if not torch.compiler.is_compiling():
        wanted = CPU_SPAN_PER_THREAD * torch.get_num_threads() if device.type == "cpu" else ACCELERATOR_SPAN
        step = count_blocks(wanted, block) * block
    for start in range(0, whole, max(step, 1)):
        yield start, min(start + step, whole)
    if whole < numel:
        yield whole, numel


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


def round_to_bf16(x: Tensor) -> Tensor:
    """fp32 -> the nearest bf16, ties to even, still as fp32; finite for |x| <= bf16's largest.

    By integers: torch.compile keeps the unrounded fp32 of `x.bfloat16().float()`, and the codes would be
    encoded with another scale than the stored one.
    """
    bits = x.view(torch.int32)
    odd = bits.bitwise_right_shift(16).bitwise_and_(1)
    return odd.add_(bits).add_(0x7FFF).bitwise_and_(-0x10000).view(torch.float32)


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


class BlockCodec:
    """A `StateCodec` from two functions on rows; see hf_lowmem/codecs/base.py for the contract.

    State: `codes` (uint8, shape of `like`, contiguous; packed codes are flat) and, per block, the scalars that
    `scalars` names with their dtypes (n_blocks,); the first of them is stored as `scale` or `uscale`.

    Every lossy codec keeps these promises, which tests/codecs hold it to:
    - a block of zeros decodes to zeros; with `signed=False` a value that was not zero never decodes to zero;
    - every finite fp32 input gives a finite output; an inf or a nan may spoil its whole block and must be
      caught upstream;
    - encoding what was decoded gives the same codes again, so a state that is only carried along does not
      drift.
    """

    name: ClassVar[str]
    block: ClassVar[int]
    bits: ClassVar[int] = 8  # of a code, 8 or 4
    scalars: ClassVar[dict[str, torch.dtype]]
    smallest: ClassVar[float]
    signed_bound: ClassVar[ErrorBound]
    unsigned_bound: ClassVar[ErrorBound]

    def encode_rows(self, x: Tensor, signed: bool) -> tuple[Tensor, ...]:
        """(rows, block) fp32 -> uint8 codes (rows, block), then the scalars (rows,), ordered as `scalars`."""
        raise NotImplementedError

    def decode_rows(self, codes: Tensor, scalars: tuple[Tensor, ...], signed: bool) -> Tensor:
        """The inverse: codes (rows, block) and scalars (rows,) -> a fresh (rows, block) fp32."""
        raise NotImplementedError

    def _keys(self, signed: bool) -> list[str]:
        return [scale_key(signed), *list(self.scalars)[1:]]

    def init(self, like: Tensor, *, signed: bool) -> Encoded:
        for table in self.tables(signed):
            table.on(like.device)
        rows = count_blocks(like.numel(), self.block)
        shape = like.shape if self.bits == 8 else (self._code_bytes(like.numel()),)
        enc = {"codes": torch.full(shape, self.zero_code(signed), dtype=torch.uint8, device=like.device)}
        for key, dtype in zip(self._keys(signed), self.scalars.values(), strict=True):
            enc[key] = torch.zeros(rows, dtype=dtype, device=like.device)
        return enc

    def zero_code(self, signed: bool) -> int:
        """The byte that `init` fills the codes with."""
        return 0

    def _code_bytes(self, numel: int) -> int:
        return -(-numel * self.bits // 8)

    def tables(self, signed: bool) -> tuple[DeviceTable, ...]:
        """What encode_rows and decode_rows look up."""
        raise NotImplementedError

    def encode_(self, enc: Encoded, value: Tensor) -> None:
        signed = is_signed(enc)
        codes, scalars = enc["codes"].view(-1), [enc[key] for key in self._keys(signed)]
        flat = value.reshape(-1)
        for start, stop in spans(flat.numel(), self.block, flat.device):
            new_codes, *new_scalars = self.encode_rows(as_rows(flat[start:stop], self.block), signed)
            new_codes = new_codes.view(-1)
            if self.bits == 4:
                new_codes = pack_pairs(new_codes)
            first, last = self._code_bytes(start), self._code_bytes(stop)
            codes[first:last].copy_(new_codes[: last - first])
            first = start // self.block
            for old, new in zip(scalars, new_scalars, strict=True):
                old[first : first + new.numel()].copy_(new)

    def decode(self, enc: Encoded, shape: torch.Size) -> Tensor:
        signed = is_signed(enc)
        codes, scalars = enc["codes"].view(-1), [enc[key] for key in self._keys(signed)]
        out = torch.empty(shape.numel(), dtype=torch.float32, device=codes.device)
        for start, stop in spans(out.numel(), self.block, out.device):
            part = codes[self._code_bytes(start) : self._code_bytes(stop)]
            if self.bits == 4:
                part = unpack_pairs(part)[: stop - start]
            rows = as_rows(part, self.block)
            first = start // self.block
            of_rows = tuple(scalar[first : first + rows.shape[0]] for scalar in scalars)
            out[start:stop].copy_(self.decode_rows(rows, of_rows, signed).view(-1)[: stop - start])
        return out.view(shape)

    def nbytes(self, numel: int) -> int:
        per_block = sum(dtype.itemsize for dtype in self.scalars.values())
        return self._code_bytes(numel) + count_blocks(numel, self.block) * per_block
