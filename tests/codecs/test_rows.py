"""Blocks that begin anew at each row: any cut along dimension 0 has the codes and scales of the whole."""

import pytest
import torch

from hf_lowmem.codecs import CODECS, BlockCodec, Dither
from hf_lowmem.codecs.rows import SHORTEST, RowCodec, by_rows
from tests.codecs.test_contract import assert_within_bound, draw

BLOCK_CODECS = [name for name, codec in CODECS.items() if isinstance(codec, BlockCodec)]
SHAPES = [(5, 256), (6, 512), (7, 70), (3, 9, 33), (4, 16), (2, 1000), (0, 70), (1, 129)]
each_codec = pytest.mark.parametrize("name", BLOCK_CODECS)
each_sign = pytest.mark.parametrize("signed", [True, False])


@each_codec
@each_sign
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dither", [None, Dither(2**35 + 1, 5)], ids=["nearest", "random"])
def test_a_part_of_the_rows_is_a_part_of_the_state(
    name: str, signed: bool, shape: tuple[int, ...], dither: Dither | None
) -> None:
    x = draw("mixed", shape)
    x = x if signed else x.abs()
    codec = by_rows(CODECS[name], x.shape)
    assert isinstance(codec, RowCodec)
    whole = codec.init(x, signed=signed)
    assert torch.equal(codec.decode(whole, x.shape), torch.zeros(shape))
    codec.encode_(whole, x, dither)
    assert sum(t.nbytes for t in whole.values()) == codec.nbytes(x.numel(), signed=signed)
    decoded = codec.decode(whole, x.shape)
    for first, last in ((0, shape[0] // 2), (shape[0] // 2, shape[0])):
        part = codec.init(x[first:last], signed=signed)
        cut = dither and Dither(dither.seed, dither.offset + first * x[0].numel() if len(x) else 0)
        codec.encode_(part, x[first:last], cut)
        assert all(torch.equal(part[k], whole[k][first:last]) for k in whole)
        assert torch.equal(codec.decode(part, x[first:last].shape), decoded[first:last])
    for row, got in zip(x, decoded, strict=True):
        if dither is None:
            assert_within_bound(CODECS[name], row.flatten(), got.flatten(), signed)


@each_codec
@each_sign
@pytest.mark.parametrize("dither", [None, Dither(2**35 + 1, 5)], ids=["nearest", "random"])
def test_rows_of_whole_blocks_are_the_flattened_tensor(name: str, signed: bool, dither: Dither | None) -> None:
    x = draw("normal", (6, 512)).abs()
    codec, flat = by_rows(CODECS[name], x.shape), CODECS[name]
    assert isinstance(codec, RowCodec)
    assert codec.aligned
    rows, plain = codec.init(x, signed=signed), flat.init(x, signed=signed)
    codec.encode_(rows, x, dither)
    flat.encode_(plain, x, dither)
    assert rows.keys() == plain.keys()
    assert all(torch.equal(rows[k].flatten(), plain[k].flatten()) for k in plain)


def test_short_rows_and_full_codecs_stay_as_they_are() -> None:
    assert by_rows(CODECS["int8"], torch.Size([9000])).name == "fp32"
    assert by_rows(CODECS["int8"], torch.Size([9000, SHORTEST - 1])).name == "fp32"
    assert by_rows(CODECS["int8"], torch.Size([9000, SHORTEST])).name == "int8"
    assert by_rows(CODECS["bf16"], torch.Size([9000, 256])) is CODECS["bf16"]
