"""int4: packing, both maps against their definitions in float64, zeros, and what must not move when carried along."""

import pytest
import torch
from torch import Tensor

from hf_lowmem.codecs import Int4Codec
from hf_lowmem.codecs.int4 import MOST_OCTAVES
from hf_lowmem.kernels.codecs.blocks import pack_pairs, unpack_pairs
from tests.codecs.test_contract import draw, encoded, roundtrip

CODEC = Int4Codec()
KINDS = ["normal", "log-normal", "heavy-tailed", "mixed", "sparse", "range"]
MAP = torch.tensor([i * abs(i) / 64 for i in range(-7, 9)], dtype=torch.float64)


def test_packing_is_a_pair_of_neighbours_a_byte() -> None:
    codes = torch.randint(16, (1000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack_pairs(codes)
    assert packed.tolist() == [low + 16 * high for low, high in codes.view(-1, 2).tolist()]
    assert torch.equal(unpack_pairs(packed), codes)


@pytest.mark.parametrize("numel", [0, 1, 2, 127, 128, 129, 255, 1001])
@pytest.mark.parametrize("signed", [True, False])
def test_half_a_byte_a_value_and_four_or_eight_a_block(numel: int, signed: bool) -> None:
    enc = CODEC.init(torch.empty(numel), signed=signed)
    assert enc["codes"].shape == ((numel + 1) // 2,)
    promised = CODEC.nbytes(numel, signed=signed)
    assert sum(t.nbytes for t in enc.values()) == promised == (numel + 1) // 2 + (4 if signed else 8) * -(-numel // 128)


def test_bytes_a_value() -> None:
    assert CODEC.nbytes(128 * 1000, signed=True) / 128_000 == 0.53125
    assert CODEC.nbytes(128 * 1000, signed=False) / 128_000 == 0.5625


@pytest.mark.parametrize("kind", KINDS)
def test_first_moment_takes_the_nearest_value_of_the_map(kind: str) -> None:
    x = draw(kind, (400, 128))
    enc = encoded(CODEC, x, True)
    scales = torch.stack([enc["scale"], enc["scale2"]], 1)
    halves = x.view(400, 2, 64)
    extreme = halves.gather(2, halves.abs().argmax(2, keepdim=True))[..., 0]
    live = extreme.abs() >= CODEC.smallest
    assert torch.equal(scales[live], extreme.clamp(-3.3895e38, 3.3895e38).bfloat16()[live])

    q = halves.double() / scales.double()[..., None]
    got = (CODEC.decode(enc, x.shape).view(400, 2, 64).double() / scales.double()[..., None])[..., None]
    distance = (q[..., None] - MAP).abs()
    # The quotient, 64 |q|, less 1/4 and the root round in fp32: 2**-22 of 8 steps at most, each 15/64 wide or less.
    assert ((got - q[..., None]).abs()[..., 0] <= distance.amin(-1) + 2.0**-20).all()
    assert ((got - MAP).abs().amin(-1) <= 2.0**-22).all()


def progression(x: Tensor) -> tuple[Tensor, Tensor]:
    """a and b of each row, float64 (rows, 1), from the docstring."""
    a = x.amax(1).clamp(min=CODEC.smallest)
    b = torch.where(x > 0, x, torch.inf).amin(1).clamp(max=torch.finfo(torch.float32).max)
    b = torch.minimum(torch.maximum(b, a * 2.0**-MOST_OCTAVES), a)
    return a.double()[:, None], b.double()[:, None]


@pytest.mark.parametrize("kind", KINDS)
def test_second_moment_takes_the_nearest_of_a_progression(kind: str) -> None:
    x = draw(kind, (400, 128)).abs()
    enc = encoded(CODEC, x, False)
    a, b = progression(x)
    assert torch.equal(enc["uscale"].double()[:, None], a)
    assert torch.equal(enc["scale2"].double()[:, None], b)
    step = (a / b).log2() / 14
    at = torch.where(step > 0, (x.double() / a).clamp(min=2.0**-100).log2() / step, 0).clamp(-14, 0)
    got = CODEC.decode(enc, x.shape).double()
    where = torch.where(step > 0, (got / a).clamp(min=2.0**-100).log2() / step, 0)
    # A logarithm of at most 2**5 has an error of 2**-19 in fp32, a step is at least 2**-8 / 14 octaves wide (neighbours
    # in bf16): 2**-7 steps.
    assert ((where - at).abs() <= 0.5 + 2.0**-7)[x > 0].all()
    assert ((where - where.round()).abs() <= 2.0**-7)[x > 0].all()
    assert torch.equal(got == 0, x == 0)


@pytest.mark.parametrize("width", [0.0, 1e-7, 1e-6, 1e-5, 1e-4, 0.002, 0.004, 0.008, 0.02, 0.1, 3.0, 40.0])
def test_narrow_and_wide_blocks_stay_when_carried(width: float) -> None:
    """A block narrower than a few units in the last place is where an end would move at each encoding."""
    g = torch.Generator().manual_seed(0)
    x = torch.exp2(torch.rand(3000, 128, generator=g) * width + torch.rand(3000, 1, generator=g))
    once = encoded(CODEC, x, False)
    again = {key: tensor.clone() for key, tensor in once.items()}
    for _ in range(20):
        CODEC.encode_(again, CODEC.decode(again, x.shape))
    assert all(torch.equal(again[key], once[key]) for key in once)


def test_ends_of_a_block_are_exact() -> None:
    x = draw("log-normal", (300, 128))
    got = roundtrip(CODEC, x, True)
    halves, decoded = x.view(300, 2, 64), got.view(300, 2, 64)
    at = halves.abs().argmax(2, keepdim=True)
    assert torch.equal(decoded.gather(2, at), halves.gather(2, at).bfloat16().float())
    assert (halves.gather(2, at) < 0).any()

    v = x.abs()
    got = roundtrip(CODEC, v, False)
    assert torch.equal(got.amax(1), v.amax(1))
    assert torch.equal(got.amin(1), v.amin(1))


def test_zeros_inside_a_block_stay_zeros() -> None:
    x = draw("normal", (50, 128))
    x[:, 5::7] = 0
    for signed, value in ((True, x), (False, x.abs())):
        got = roundtrip(CODEC, value, signed)
        assert (got[:, 5::7] == 0).all()
        if not signed:
            assert (got[value > 0] > 0).all()


def test_one_tiny_value_does_not_spoil_a_block() -> None:
    """It is raised to 2**-28 of the largest; the others keep the factor of 2 that they are promised."""
    v = draw("log-normal", (50, 128)).abs().clamp(1e-8, 1e-3)
    v[:, 9] = 1e-35
    got = roundtrip(CODEC, v, False)
    rest = torch.arange(128) != 9
    factor = (got / v)[:, rest]
    assert factor.max() <= 2 * (1 + 2.0**-12)
    assert factor.min() >= 0.5 * (1 - 2.0**-12)
    largest = v.amax(1)
    assert torch.allclose(got[:, 9], largest * 2.0**-MOST_OCTAVES, rtol=2.0**-18, atol=0)


@pytest.mark.parametrize("sigma", [1.0, 2.0, 3.0])
def test_a_progression_beats_the_even_map_for_a_second_moment(sigma: float) -> None:
    """arXiv 2309.01507's map for v, 1/16 to 16/16 of the largest, by the mean error of 1 / sqrt(v)."""
    v = torch.exp(sigma * torch.randn(500, 128, generator=torch.Generator().manual_seed(0)))
    largest = v.amax(1, keepdim=True)
    even = (v / largest * 16).round().clamp(min=1) / 16 * largest
    ours = roundtrip(CODEC, v, False)
    error = [((v / got).sqrt() - 1).abs().mean().item() for got in (ours, even)]
    assert error[0] < error[1] / 2
