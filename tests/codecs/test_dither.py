"""Codes rounded at random: unbiased given what is encoded, and the same numbers whatever part is encoded."""

import pytest
import torch
from torch import Tensor

from hf_lowmem.codecs import CODECS, BlockCodec, Dither
from tests.codecs.test_contract import KINDS, draw, encoded

LOSSY = [name for name in CODECS if name != "fp32"]
each_codec = pytest.mark.parametrize("name", LOSSY)
each_sign = pytest.mark.parametrize("signed", [True, False])


def at_random(name: str, x: Tensor, signed: bool, dither: Dither) -> Tensor:
    codec = CODECS[name]
    enc = codec.init(x, signed=signed)
    codec.encode_(enc, x, dither)
    return codec.decode(enc, x.shape)


def contents(signed: bool) -> Tensor:
    """Blocks of several kinds, without what an fp32 or a codec's least code cannot hold."""
    kinds = ("normal", "log-normal", "heavy-tailed", "sparse", "constant")
    x = torch.stack([draw(kind, (768,)) for kind in kinds])
    return x if signed else x.abs()


@pytest.mark.parametrize("name", [name for name in LOSSY if name != "int4"])
def test_the_mean_of_a_first_moment_is_what_was_encoded(name: str) -> None:
    """Also of values far below their block's least code, which are zero nearly always."""
    x, count = contents(True), 600
    found = torch.stack([at_random(name, x, True, Dither(seed)) for seed in range(count)]).double()
    error = found.mean(0) - x
    # A mean of draws between two codes; one that was never drawn has no spread: as wide as what would show once.
    spread = found.std(0) / count**0.5
    step = (found.amax(0) - found.amin(0)).clamp(min=1e-30)
    largest = x.abs().view(-1, 64).amax(1).repeat_interleave(64).view_as(x)
    assert (
        error.abs()
        <= 5 * spread + 10 * step / count + torch.where(step > 1e-30, 0, largest * 0.02) + x.abs() * 2.0**-20
    ).all()
    assert abs((error / spread.clamp(min=1e-30))[spread > 0].mean().item()) < 0.2, "all lean to one side"


@each_codec
def test_the_mean_logarithm_of_a_second_moment_is_what_was_encoded(name: str) -> None:
    x, count = contents(False) + 1e-9, 400
    x = torch.maximum(x, x.view(-1, 256).amax(1).repeat_interleave(256).view_as(x) * 1e-4)  # above every floor
    found = torch.stack([at_random(name, x, False, Dither(seed)) for seed in range(count)]).double().log()
    error = found.mean(0) - x.double().log()
    spread = found.std(0) / count**0.5
    if name == "bf16":  # by its value: two neighbours are so close that it is all the same
        error, spread = (found.exp().mean(0) / x - 1), spread
    # Of int8's last decade here two neighbours are up to a half apart, and the comparison is right to a twelfth of
    # the cube of that.
    assert (error.abs() <= 5 * spread + 0.012).all()
    assert error.mean().abs() <= 2e-3


@each_codec
@each_sign
@pytest.mark.parametrize("kind", KINDS)
def test_finite_and_never_nothing(name: str, signed: bool, kind: str) -> None:
    x = draw(kind) if signed else draw(kind).abs()
    got = at_random(name, x, signed, Dither(7))
    assert got.isfinite().all()
    assert (got * x.sign() >= 0).all(), "a sign changed"
    assert (got[x == 0] == 0).all()
    if not signed:
        assert (got[x > 0] > 0).all()


@each_codec
@each_sign
def test_what_a_code_stands_for_is_left_as_it_is(name: str, signed: bool) -> None:
    """A state that does not move is not moved: nor does rounding it make a walk of it."""
    x = at_random(name, contents(signed), signed, Dither(0))
    codec = CODECS[name]
    if isinstance(codec, BlockCodec):
        x = codec.decode(encoded(codec, x, signed), x.shape)
    got = at_random(name, x, signed, Dither(1))
    moved = ~torch.isclose(got, x, rtol=1e-5, atol=0)
    assert moved.float().mean() < 0.002, (
        "a quotient that is a unit in the last place off may take the neighbour, rarely"
    )


@each_codec
@each_sign
def test_a_part_takes_the_numbers_of_its_place(name: str, signed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a long parameter in parts, or a shard: whatever is encoded together, in spans of whatever size."""
    x = draw("normal", (5, 1024))
    x = x if signed else x.abs()
    whole = at_random(name, x, signed, Dither(3))
    parts = [at_random(name, x[i : i + 1], signed, Dither(3, i * 1024)) for i in range(5)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(at_random(name, x, signed, Dither(4)), whole)
    monkeypatch.setattr("hf_lowmem.kernels.spans.CPU_SPAN_PER_THREAD", 300)  # no multiple of a block
    assert torch.equal(at_random(name, x, signed, Dither(3)), whole)


@each_sign
def test_thresholds_are_even_and_those_of_the_two_moments_apart(signed: bool) -> None:
    u = Dither(9).thresholds(0, 1 << 18, signed, torch.device("cpu"))
    assert u.min() > 0
    assert u.max() < 1
    counts = torch.histc(u, 64, 0, 1)
    assert ((counts - (1 << 12)).abs() < 5 * (1 << 6)).all()
    other = Dither(9).thresholds(0, 1 << 18, not signed, torch.device("cpu"))
    following = Dither(10).thresholds(0, 1 << 18, signed, torch.device("cpu"))
    for second in (other, following, u.roll(1)):
        assert torch.corrcoef(torch.stack([u, second]))[0, 1].abs() < 5 / (1 << 9)
