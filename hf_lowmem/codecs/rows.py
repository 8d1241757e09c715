"""Blocks that begin anew at each row: the layout of a state that is cut into shards.

A codec's blocks run over the flattened tensor, so where a row's length is no multiple of the block, a block holds the
end of one row and the beginning of the next, and a cut between the two would go through it. Its scale could then belong
to neither side. Here each row of dimension 0 is encoded for itself, and scales have the shape (rows, blocks of a row):
whatever rows a process has, it has their codes and their scales, on any number of processes. A checkpoint is cut
otherwise without touching a byte.

Where the length is a multiple of the block (the widths of nearly all models are one of 256), these are the very blocks
of the flattened tensor, and the codec does the work itself. Why then not everywhere: a row of 4 values, such as
APOLLO's moments at rank 4 have, would take 4 codes and a scale of 4 bytes. Rows shorter than `SHORTEST` keep fp32
instead, which is right for shards, where such states are few and divided, and wrong for one process.
"""

import math
from typing import cast

import torch
from torch import Tensor

from hf_lowmem.codecs.base import Encoded, StateCodec
from hf_lowmem.codecs.blocks import BlockCodec, count_blocks, is_signed
from hf_lowmem.codecs.full import Fp32Codec
from hf_lowmem.kernels.codecs.blocks import pack_pairs, unpack_pairs
from hf_lowmem.kernels.codecs.dither import Dither
from hf_lowmem.kernels.spans import spans

SHORTEST = 16  # values; int8 takes 1.25 bytes a value there


def by_rows(codec: StateCodec, shape: torch.Size) -> StateCodec:
    """The codec of a state of `shape` whose rows (of dimension 0) are encoded each for itself.

    Its tensors are those of `codec` for one row, with the rows in front: codes of `shape`, scalars (rows, blocks).
    """
    length = shape[1:].numel()
    if not isinstance(codec, BlockCodec):
        return codec
    if length < SHORTEST:
        return Fp32Codec()
    return cast(StateCodec, RowCodec(codec, length))  # whose name is its own, not its class's


class RowCodec:
    """`inner`, with blocks that begin anew at each row; a `StateCodec` for tensors whose rows have `length` values."""

    def __init__(self, inner: BlockCodec, length: int) -> None:
        self.inner, self.length = inner, length
        self.name = inner.name
        self.blocks = count_blocks(length, inner.block)
        self.aligned = length % inner.block == 0

    def init(self, like: Tensor, *, signed: bool) -> Encoded:
        row = self.inner.init(like.new_empty(self.length), signed=signed)
        rows = like.shape[0]
        enc = {key: t.expand(rows, *t.shape).clone() for key, t in row.items()}
        if self.inner.bits == 8:
            enc["codes"] = enc["codes"].view(like.shape)
        return enc

    def flat(self, enc: Encoded) -> Encoded:
        """The same tensors as `inner` lays them out, where the blocks are the same."""
        assert self.aligned
        return {key: t if key == "codes" else t.view(-1) for key, t in enc.items()}

    def encode_(self, enc: Encoded, value: Tensor, dither: Dither | None = None) -> None:
        if self.aligned:
            self.inner.encode_(self.flat(enc), value, dither)
            return
        rows, signed = value.shape[0], is_signed(enc)
        value, codes = value.reshape(rows, self.length), self._code_rows(enc)
        scalars = self.inner.scalars_of(enc)
        padding = self.blocks * self.inner.block - self.length
        for start, stop in self._spans(rows, value.device):
            words = None
            if dither is not None:
                bits = dither.of_state(start * self.length, stop * self.length, signed, value.device)
                words = torch.nn.functional.pad(bits.view(-1, self.length), (0, padding)).view(-1, self.inner.block)
            padded = torch.nn.functional.pad(value[start:stop], (0, padding))
            new, *of_blocks = self.inner.encode_rows(padded.view(-1, self.inner.block), signed, words)
            new = new.view(-1)
            if self.inner.bits == 4:
                new = pack_pairs(new)
            codes[start:stop].copy_(new.view(stop - start, -1)[:, : codes.shape[1]])
            for old, scalar in zip(scalars, of_blocks, strict=True):
                old[start:stop].copy_(scalar.view(stop - start, self.blocks))

    def decode(self, enc: Encoded, shape: torch.Size) -> Tensor:
        if self.aligned:
            return self.inner.decode(self.flat(enc), shape)
        signed, codes = is_signed(enc), self._code_rows(enc)
        scalars = self.inner.scalars_of(enc)
        out = torch.empty(shape[0], self.length, dtype=torch.float32, device=codes.device)
        padding = self.inner.block * self.blocks * self.inner.bits // 8 - codes.shape[1]
        for start, stop in self._spans(shape[0], codes.device):
            part = torch.nn.functional.pad(codes[start:stop], (0, padding)).view(-1)
            if self.inner.bits == 4:
                part = unpack_pairs(part)
            of_blocks = tuple(t[start:stop].reshape(-1) for t in scalars)
            rows = self.inner.decode_rows(part.view(-1, self.inner.block), of_blocks, signed)
            out[start:stop].copy_(rows.view(stop - start, -1)[:, : self.length])
        return out.view(shape)

    def nbytes(self, numel: int, *, signed: bool) -> int:
        """Bytes of a state of whole rows with `numel` values together."""
        return numel // self.length * self.inner.nbytes(self.length, signed=signed)

    def _code_rows(self, enc: Encoded) -> Tensor:
        codes = enc["codes"]
        return codes.view(codes.shape[0], math.prod(codes.shape[1:]))

    def _spans(self, rows: int, device: torch.device) -> list[tuple[int, int]]:
        """Ranges of rows, as large as the spans of `inner`."""
        wide = self.blocks * self.inner.block
        return [(start // wide, stop // wide) for start, stop in spans(rows * wide, wide, device)]
