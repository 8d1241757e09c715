"""fp8 and fp8_expand: torch's cast as the oracle, the expanded domain, what it buys a second moment."""

import math

import pytest
import torch
from torch import Tensor

from hf_lowmem.codecs import CODECS, Fp8Codec, Fp8ExpandCodec
from hf_lowmem.kernels.codecs.blocks import smallest_nonzero
from hf_lowmem.kernels.codecs.reference import SMALLEST_A, SMALLEST_B
from hf_lowmem.kernels.codecs.tables import E4M3_MIN, DeviceTable, exponents
from hf_lowmem.kernels.exact import BF16_MAX, E4M3_MAX, round_bf16
from tests.codecs.test_contract import draw, encoded, roundtrip

KINDS = ["normal", "log-normal", "heavy-tailed", "mixed", "sparse", "range"]
EXPAND = Fp8ExpandCodec()


def e4m3(codes: Tensor) -> Tensor:
    return codes.view(torch.float8_e4m3fn).float()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("signed", [True, False])
def test_fp8_equals_torchs_cast(kind: str, signed: bool) -> None:
    x = draw(kind, (100, 128))
    x = x if signed else x.abs()
    enc = encoded(Fp8Codec(), x, signed)
    scale = enc["scale" if signed else "uscale"][:, None]
    assert torch.equal(scale, (x.abs().amax(1, keepdim=True) / 448).clamp(min=2.0**-117))
    want = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    if not signed:
        want = torch.where((want == 0) & (x > 0), 1, want)
    assert torch.equal(enc["codes"], want)
    assert torch.equal(Fp8Codec().decode(enc, x.shape), e4m3(want) * scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("signed", [True, False])
def test_expand_equals_its_definition(kind: str, signed: bool) -> None:
    """In float64, from the docstring; equal but where the expanded value is within fp32's error of a tie."""
    x = draw(kind, (200, 128))
    x = x if signed else x.abs()
    enc = encoded(EXPAND, x, signed)
    a = enc["scale" if signed else "uscale"]
    magnitude = x.abs().double()
    assert torch.equal(a, magnitude.amax(1).float().clamp(min=SMALLEST_A))

    b = torch.where(magnitude > 0, magnitude, torch.inf).amin(1).clamp(min=SMALLEST_B)
    binades = (a.double() / b).log2().clamp(min=1e-9)
    ideal = (math.log2(448 / 2**-9 if signed else 448 / 2**-6) / binades).clamp(1 if signed else 2**-1.75, 2**2.5)
    k = exponents()[enc["power"].long()].double()
    assert ((k / ideal).log2().abs() <= 0.501 / 60).all()  # the nearest step, with fp32's error of half a step

    q = ((magnitude / a[:, None].double()) ** k[:, None] * E4M3_MAX).clamp(max=E4M3_MAX)
    got = e4m3(enc["codes"]).double()
    # fp32: the exponent k log2 r is below 32 in size where q is not zero, and three roundings of it (the
    # quotient's, the logarithm's, the product's) are each at most 2**-20, so q is off by less than 2**-17.
    slack = q * 2.0**-17
    low, high = (e4m3(side.float().to(torch.float8_e4m3fn)).double() for side in (q - slack, q + slack))
    floor = (magnitude > 0) * E4M3_MIN
    assert (got.abs() >= low.maximum(floor)).all()
    assert (got.abs() <= high.maximum(floor)).all()
    assert (got.sign() == x.sign()).all()

    want = got.sign() * (got.abs() / E4M3_MAX) ** (1 / k[:, None]) * a[:, None].double()
    # log2 of what is decoded is at most 60; k in fp32 is off by 2**-22 of it: 2**-16 with the two last roundings.
    assert ((EXPAND.decode(enc, x.shape) - want).abs() <= want.abs() * 2.0**-16).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("signed", [True, False])
def test_expand_normal_codes_are_exact_to_the_kth_part(kind: str, signed: bool) -> None:
    x = draw(kind, (200, 128))
    x = x if signed else x.abs()
    enc = encoded(EXPAND, x, signed)
    got = EXPAND.decode(enc, x.shape)
    k = exponents()[enc["power"].long()][:, None].expand_as(x)
    normal = e4m3(enc["codes"]).abs() >= 2.0**-6
    assert normal.any()
    relative = (got / x - 1).abs()[normal]
    # 2**-8: the largest value is replaced by its bf16. 2**-14: fp32's error in q (2**-17) over the least k, 0.297.
    allowed = ((16 / 15) ** (1 / k[normal]) - 1).clamp(min=2.0**-8)
    assert (relative <= allowed + 2.0**-14).all()


@pytest.mark.parametrize(("signed", "lowest", "binades"), [(True, 0x01, 17.8), (False, 0x08, 49.7)])
def test_expand_gives_the_smallest_value_its_code(signed: bool, lowest: int, binades: float) -> None:
    """2**-9 or 2**-6, in groups of every width from the one that the largest k fills to what the least k holds."""
    narrowest = (17.81 if signed else 14.81) / 2**2.5
    for width in torch.linspace(narrowest, binades, 400).tolist():
        x = torch.exp2(-torch.linspace(0, width, 128))
        codes = encoded(EXPAND, x, signed)["codes"]
        assert codes.min() == lowest
        assert codes.max() == 0x7E


@pytest.mark.parametrize("signed", [True, False])
def test_expand_ignores_zeros_and_survives_equal_values(signed: bool) -> None:
    x = torch.full((4, 128), 3.0)
    x[1, ::2] = 0
    x[2] = 0
    x[3, 5] = 1e-3
    enc = encoded(EXPAND, x, signed)
    assert enc["power"].tolist()[:3] == [255, 255, 255]
    got = EXPAND.decode(enc, x.shape)
    assert torch.equal(got[:3], x[:3])
    # Two values 3000 apart take the format's two ends; k is half a step (0.58 % of ln 3000) off at most.
    assert abs(math.log(got[3, 5].item() / 1e-3)) < 0.0058 * math.log(3000)
    assert torch.equal(smallest_nonzero(x.abs())[[0, 1, 3]], torch.tensor([3.0, 3.0, 1e-3]))


def test_round_to_bf16_equals_torchs_cast() -> None:
    x = torch.cat([draw("range", (5000,)), torch.tensor([0.0, 1.00390625, 1.01171875, BF16_MAX, -BF16_MAX])])
    assert torch.equal(round_bf16(x), x.bfloat16().float())


def worst_of_inverse_root(name: str, v: Tensor) -> float:
    got = roundtrip(CODECS[name], v, False)
    return ((v / got).sqrt() - 1).abs().max().item()


@pytest.mark.parametrize("sigma", [1.0, 1.5, 2.0, 2.5, 3.0])
def test_expand_is_the_codec_for_a_second_moment(sigma: float) -> None:
    """Log-normal v: the others' worst is their floor, far above v's smallest; ours is 6.3 % / 2k."""
    g = torch.Generator().manual_seed(0)
    v = torch.exp(sigma * torch.randn(2000, 128, generator=g)) * 1e-8
    worst = {name: worst_of_inverse_root(name, v) for name in ("int8", "fp8", "fp8_expand")}
    widest = (v.amax(1) / v.amin(1)).log2().max().item() * (1 + 0.006) + 2**-8  # k's step, and a's bf16
    # v / decoded lies between (15/16)**(1/k) and (17/16)**(1/k), k = 14.8 / widest.
    allowed = (17 / 16) ** (widest / math.log2(448 / 2**-6) / 2) - 1
    assert worst["fp8_expand"] <= allowed + 2.0**-12
    assert worst["fp8_expand"] < min(worst["int8"], worst["fp8"])
    if sigma >= 2:
        assert worst["fp8_expand"] < min(worst["int8"], worst["fp8"]) / 5


def test_expand_takes_fewer_bytes_than_coat() -> None:
    numel = 128 * 1000
    for signed in (True, False):
        assert EXPAND.nbytes(numel, signed=signed) == numel + 5 * 1000
        assert EXPAND.nbytes(numel, signed=signed) / numel < 1 + 12 / 128  # three fp32 a group


def test_a_table_is_built_once_a_device() -> None:
    built = []
    table = DeviceTable(lambda: built.append(1) or torch.arange(3.0))
    with torch.inference_mode():
        first = table.on(torch.device("cpu"))
    assert table.on(torch.device("cpu")) is first
    assert len(built) == 1
    assert not first.is_inference()
