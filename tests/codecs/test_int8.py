"""int8: the map, the nearest-value table, and bitsandbytes as the oracle."""

import pytest
import torch
from torch import Tensor

from hf_lowmem.codecs import Int8Codec
from hf_lowmem.codecs.int8 import dynamic_map
from tests.codecs.test_contract import draw, encoded

CODEC = Int8Codec()


def nearest(quotient: Tensor, signed: bool) -> Tensor:
    """The definition: the map's nearest value, a tie to the lower one, midpoints exact in float64."""
    values = dynamic_map(signed).double()
    return torch.searchsorted((values[:-1] + values[1:]) / 2, quotient.double())


@pytest.mark.parametrize("signed", [True, False])
def test_map_equals_bitsandbytes(signed: bool) -> None:
    oracle = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(dynamic_map(signed), oracle.create_dynamic_map(signed))
    assert dynamic_map(signed).unique().numel() == 256


@pytest.mark.parametrize("signed", [True, False])
def test_table_finds_the_nearest_at_every_midpoint(signed: bool) -> None:
    """A wrong table is wrong beside a midpoint or at an edge of its 65536 intervals: all of them, +- 2 units."""
    values = dynamic_map(signed).double()
    middles = ((values[:-1] + values[1:]) / 2).float().view(torch.int32)
    edges = torch.arange(0x3F80) << 16
    edges = torch.cat([edges, edges - (1 << 31)]) if signed else edges
    patterns = torch.cat([(base.long()[:, None] + torch.arange(-2, 3)).flatten() for base in (middles, edges)])
    x = patterns.int().view(torch.float32)
    x = x[x.abs() <= 1] if signed else x[(x >= 0) & (x <= 1)]
    rows = torch.nn.functional.pad(x, (0, -x.numel() % 255)).view(-1, 255)
    rows = torch.cat([rows, torch.ones(rows.shape[0], 1)], 1)  # the extreme is 1, so quotients are the values
    got = encoded(CODEC, rows, signed)["codes"].long()
    want = nearest(rows, signed)
    assert torch.equal(got, want if signed else want.maximum((rows != 0).long()))


@pytest.mark.parametrize("kind", ["normal", "log-normal", "heavy-tailed", "mixed", "sparse"])
@pytest.mark.parametrize("numel", [256 * 200, 256 * 50 + 77, 255, 1])
@pytest.mark.parametrize("signed", [True, False])
def test_against_bitsandbytes(kind: str, numel: int, signed: bool) -> None:
    """Their CPU kernel first snaps the quotient to a grid of 2**-15, so its choice may be that much worse.

    Blocks whose extreme is negative are mirrored for them, as our scale carries the extreme's sign.
    """
    oracle = pytest.importorskip("bitsandbytes.functional")
    x = draw(kind, (numel,))
    x = x if signed else x.abs()
    enc = encoded(CODEC, x, signed)
    scale = enc["scale" if signed else "uscale"].repeat_interleave(256)[:numel]
    mirrored = x * scale.sign()
    codes, state = oracle.quantize_blockwise(mirrored, code=dynamic_map(signed), blocksize=256)
    assert torch.equal(scale.abs()[::256], state.absmax.clamp(min=CODEC.smallest))

    quotient, values = x / scale, dynamic_map(signed)
    ours, theirs = enc["codes"].long(), codes.long()
    floored = (nearest(quotient, signed) == 0) & (x != 0) if not signed else torch.zeros(numel, dtype=torch.bool)
    assert torch.equal(ours[~floored], nearest(quotient, signed)[~floored])
    assert (ours[floored] == 1).all()
    error_ours = (values[ours] - quotient).abs()
    error_theirs = (values[theirs] - quotient).abs()
    live = ~floored & (state.absmax.repeat_interleave(256)[:numel] > 0)  # all-zero blocks have no quotient there
    assert (error_ours <= error_theirs)[live].all()
    assert (error_theirs - error_ours)[live].max() <= 2.0**-15 if live.any() else True


@pytest.mark.parametrize("signed", [True, False])
def test_codes_equal_bitsandbytes_exact_search(signed: bool) -> None:
    """For other dtypes than its kernels' bitsandbytes searches all 256 distances in fp32: exact but near ties."""
    pytest.importorskip("bitsandbytes")
    x = draw("log-normal", (64, 256))
    x[:, 0] = x.abs().amax(1).log2().ceil().exp2()  # the extreme a power of two: x / a and x * (1 / a) are equal
    x = x if signed else x.abs()
    codes, _ = torch.ops.bitsandbytes.quantize_blockwise(x.double(), dynamic_map(signed), 256)
    ours = encoded(CODEC, x, signed)["codes"]
    middles = dynamic_map(signed).double()
    middles = (middles[:-1] + middles[1:]) / 2
    quotient = (x / x[:, :1]).double()
    near_a_tie = (quotient[..., None] - middles).abs().amin(-1) <= 2.0**-24  # a distance below 1 rounds by this
    expected = codes.long() if signed else codes.long().maximum((x != 0).long())
    assert torch.equal(ours.long()[~near_a_tie], expected[~near_a_tie])
    assert near_a_tie.double().mean() < 0.5


def test_extreme_is_exact_whatever_its_sign() -> None:
    x = draw("normal", (100, 256))
    enc = encoded(CODEC, x, True)
    extreme = x.gather(1, x.abs().argmax(1, keepdim=True)).flatten()
    assert (extreme < 0).any()
    assert (extreme > 0).any()
    assert torch.equal(enc["scale"], extreme)
    assert torch.equal(CODEC.decode(enc, x.shape).gather(1, x.abs().argmax(1, keepdim=True)).flatten(), extreme)


def test_bytes() -> None:
    assert CODEC.nbytes(256 * 1000, signed=True) == 256 * 1000 + 4 * 1000
