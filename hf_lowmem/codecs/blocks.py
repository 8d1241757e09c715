"""The block codecs' common part: a code of 8 or 4 bits a value, few scalars a block, blocks over the flattened tensor.

A block codec is two pure functions on a matrix whose rows are blocks; `BlockCodec` makes a `StateCodec` of them. The
loops over spans of rows are in hf_lowmem/kernels/codecs/blocks.py, and so are, for the codecs that have a Triton
kernel, the functions themselves: kernels lie below this package.

Codes of 4 bits are packed two a byte, neighbours together. They have no shape of their own, as a last dimension of odd
length has no half.

Signedness is a key of the dict, not a value in it, so it costs no byte and reading it waits for no device:
the first scalar is called `scale` for a signed state and `uscale` for one whose values are all >= 0.
"""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from hf_lowmem.codecs.base import Encoded
from hf_lowmem.kernels.codecs import DECODE_STATE, ENCODE_STATE, through_op
from hf_lowmem.kernels.codecs.blocks import code_bytes, decode_blocks, encode_blocks
from hf_lowmem.kernels.codecs.dither import Dither
from hf_lowmem.kernels.codecs.reference import CODECS, decode_state, encode_state
from hf_lowmem.kernels.codecs.tables import DeviceTable


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


class BlockCodec:
    """A `StateCodec` from two functions on rows; see hf_lowmem/codecs/base.py for the contract.

    State: `codes` (uint8, shape of `like`, contiguous; packed codes are flat) and, per block, the scalars that
    `scalars` names with their dtypes (n_blocks,), `unsigned_scalars` where those of unsigned states differ; the first
    of them is stored as `scale` or `uscale`.

    Every lossy codec keeps these promises, which tests/codecs hold it to:
    - a block of zeros decodes to zeros; with `signed=False` a value that was not zero never decodes to zero;
    - every finite fp32 input gives a finite output; an inf or a nan may spoil its whole block and must be
      caught upstream;
    - encoding what was decoded, to the nearest, gives the same codes again, so a state that is only carried along does
      not drift.
    """

    name: ClassVar[str]
    block: ClassVar[int]
    bits: ClassVar[int] = 8  # of a code, 8 or 4
    scalars: ClassVar[dict[str, torch.dtype]]
    unsigned_scalars: ClassVar[dict[str, torch.dtype]] = {}
    smallest: ClassVar[float]
    signed_bound: ClassVar[ErrorBound]
    unsigned_bound: ClassVar[ErrorBound]

    def encode_rows(self, x: Tensor, signed: bool, words: Tensor | None) -> tuple[Tensor, ...]:
        """(rows, block) fp32 -> uint8 codes (rows, block), then the scalars (rows,), ordered as `scalars`.

        `words`: random bits of the shape of x, int32, for codes at random; None: the nearest ones.
        """
        raise NotImplementedError

    def decode_rows(self, codes: Tensor, scalars: tuple[Tensor, ...], signed: bool) -> Tensor:
        """The inverse: codes (rows, block) and scalars (rows,) -> a fresh (rows, block) fp32."""
        raise NotImplementedError

    def _keys(self, signed: bool) -> list[str]:
        return [scale_key(signed), *list(self.scalars)[1:]]

    def scalar_types(self, signed: bool) -> dict[str, torch.dtype]:
        """Names and dtypes of the scalars of one block."""
        return self.scalars if signed else self.unsigned_scalars or self.scalars

    def scalars_of(self, enc: Encoded) -> list[Tensor]:
        """The scalars of a state, in the order of `scalars`."""
        return [enc[key] for key in self._keys(is_signed(enc))]

    def init(self, like: Tensor, *, signed: bool) -> Encoded:
        """Encoded zeros, with the codec's tables on the device."""
        for table in self.tables(signed):
            table.on(like.device)
        rows = count_blocks(like.numel(), self.block)
        shape = like.shape if self.bits == 8 else (code_bytes(like.numel(), self.bits),)
        enc = {"codes": torch.full(shape, self.zero_code(signed), dtype=torch.uint8, device=like.device)}
        for key, dtype in zip(self._keys(signed), self.scalar_types(signed).values(), strict=True):
            enc[key] = torch.zeros(rows, dtype=dtype, device=like.device)
        return enc

    def zero_code(self, signed: bool) -> int:
        """The byte that `init` fills the codes with."""
        return 0

    def tables(self, signed: bool) -> tuple[DeviceTable, ...]:
        """Tables that encode_rows and decode_rows look up."""
        raise NotImplementedError

    def encode_(self, enc: Encoded, value: Tensor, dither: Dither | None = None) -> None:
        """Overwrite a state, span by span of its blocks."""
        encode_blocks(
            value,
            enc["codes"],
            self.scalars_of(enc),
            rows=self.encode_rows,
            block=self.block,
            signed=is_signed(enc),
            dither=dither,
            bits=self.bits,
        )

    def decode(self, enc: Encoded, shape: torch.Size) -> Tensor:
        """The stored values, span by span of their blocks."""
        return decode_blocks(
            enc["codes"],
            self.scalars_of(enc),
            shape,
            rows=self.decode_rows,
            block=self.block,
            signed=is_signed(enc),
            bits=self.bits,
        )

    def nbytes(self, numel: int, *, signed: bool) -> int:
        """Bytes of the codes and of each block's scalars."""
        per_block = sum(dtype.itemsize for dtype in self.scalar_types(signed).values())
        return code_bytes(numel, self.bits) + count_blocks(numel, self.block) * per_block


class KernelCodec(BlockCodec):
    """A block codec whose two functions are a kernel's reference, so that on a GPU its Triton runs instead."""

    def encode_rows(self, x: Tensor, signed: bool, words: Tensor | None) -> tuple[Tensor, ...]:
        return CODECS[self.name].encode(x, signed, words)

    def decode_rows(self, codes: Tensor, scalars: tuple[Tensor, ...], signed: bool) -> Tensor:
        return CODECS[self.name].decode(codes, scalars, signed)

    def tables(self, signed: bool) -> tuple[DeviceTable, ...]:
        return CODECS[self.name].tables(signed)

    def encode_(self, enc: Encoded, value: Tensor, dither: Dither | None = None) -> None:
        """Overwrite a state by the kernel, where its operator can be called."""
        run = ENCODE_STATE if through_op(value) else encode_state
        seed, offset = (None, 0) if dither is None else dither
        run(value, enc["codes"], self.scalars_of(enc), self.name, is_signed(enc), seed, offset)

    def decode(self, enc: Encoded, shape: torch.Size) -> Tensor:
        """The stored values by the kernel, where its operator can be called."""
        run = DECODE_STATE if through_op(enc["codes"]) else decode_state
        return run(enc["codes"], self.scalars_of(enc), self.name, is_signed(enc)).view(shape)
