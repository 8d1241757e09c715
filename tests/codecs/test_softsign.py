"""int8_softsign: its definition in float64, the bound it states, every code carried along, what it buys a moment."""

import pytest
import torch
from torch import Tensor

from hf_lowmem.codecs import CODECS, SoftsignCodec
from hf_lowmem.kernels.codecs.tables import SOFTNESS, STEPS, softsign_values
from hf_lowmem.kernels.exact import round_bf16_up
from tests.codecs.test_contract import draw, encoded, roundtrip

CODEC = SoftsignCodec()
KINDS = ["normal", "log-normal", "heavy-tailed", "mixed", "sparse", "range"]


def compand(u: Tensor) -> Tensor:
    return (1 + SOFTNESS) * u / (u.abs() + SOFTNESS)


def scale_of(x: Tensor, signed: bool) -> Tensor:
    return encoded(CODEC, x, signed)["scale" if signed else "uscale"].double()[:, None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("signed", [True, False])
def test_equals_its_definition(kind: str, signed: bool) -> None:
    """In float64, from the docstring; equal but where the companded value is within fp32's error of a tie."""
    x = draw(kind, (500, 64))
    x = x if signed else x.abs()
    enc = encoded(CODEC, x, signed)
    largest = x.abs().amax(1).clamp(CODEC.smallest, torch.finfo(torch.bfloat16).max)
    scale = enc["scale" if signed else "uscale"]
    assert scale.dtype == (torch.bfloat16 if signed else torch.float32)
    assert torch.equal(scale.float(), round_bf16_up(largest) if signed else largest)

    u = x.double() / scale_of(x, signed)
    steps = compand(u if signed else u.sqrt()) * STEPS[signed]
    # Five roundings of fp32, each 2**-24 of a number of at most 255 steps: less than 2**-13.
    low, high = (steps - 2.0**-13).round(), (steps + 2.0**-13).round()
    got = enc["codes"].view(torch.int8).double() if signed else enc["codes"].double()
    floor = (x > 0).double() if not signed else torch.full_like(x, -torch.inf).double()
    assert (got >= torch.maximum(low, floor)).all()
    assert (got <= torch.maximum(high, floor)).all()

    y = got / STEPS[signed]
    want = SOFTNESS * y / (1 + SOFTNESS - y.abs())
    want = (want if signed else want.square()) * scale_of(x, signed)
    assert torch.allclose(CODEC.decode(enc, x.shape).double(), want, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("signed", [True, False])
def test_stated_bound_is_the_worst_case_and_not_much_more(signed: bool) -> None:
    """Exact worst cases are at the midpoints of y, computed in float64 with the code on either side."""
    steps, power = STEPS[signed], 1 if signed else 2
    y = torch.arange(steps + 1, dtype=torch.float64) / steps
    values = (SOFTNESS * y / (1 + SOFTNESS - y)) ** power
    tie = (y[1:] + y[:-1]) / 2
    tie = (SOFTNESS * tie / (1 + SOFTNESS - tie)) ** power
    error = torch.maximum(values[1:] - tie, tie - values[:-1])
    bound = CODEC.signed_bound if signed else CODEC.unsigned_bound
    allowed = torch.maximum(bound.relative * tie, torch.full_like(tie, bound.absolute))
    assert (error <= allowed).all()
    relative = tie >= SOFTNESS ** (2 * power)  # where the relative part governs
    assert (error / allowed)[relative].max() > 0.95
    assert (error / allowed)[~relative].max() > 0.85


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_survives_at_every_rounding_of_the_scale(signed: bool) -> None:
    codes = [c for c in range(256) if not (signed and c == 128)]
    top = 127 if signed else 255
    rows = torch.tensor([[top, *codes[start : start + 63]] for start in range(0, len(codes) - 62, 32)])
    assert set(rows.flatten().tolist()) == set(codes)
    mantissas = 1 + torch.arange(128) / 128
    for exponent in (-100, 0, 100):
        scale = (mantissas * 2.0**exponent).repeat_interleave(len(rows))
        x = softsign_values(signed)[rows].repeat(128, 1) * scale[:, None]
        enc = encoded(CODEC, x, signed)
        assert torch.equal(enc["codes"].long(), rows.repeat(128, 1))
        assert torch.equal(enc["scale" if signed else "uscale"].float(), scale)


@pytest.mark.parametrize("signed", [True, False])
def test_the_largest_takes_the_last_code_whatever_its_mantissa(signed: bool) -> None:
    x = torch.zeros(2000, 64)
    x[:, 3] = torch.linspace(1, 2, 2000)
    enc = encoded(CODEC, x, signed)
    assert (enc["codes"][:, 3] == (127 if signed else 255)).all()
    assert torch.equal(CODEC.decode(enc, x.shape)[:, 3], round_bf16_up(x[:, 3].contiguous()) if signed else x[:, 3])
    if signed:
        assert (encoded(CODEC, -x, True)["codes"][:, 3].view(torch.int8) == -127).all()


def test_floor_of_a_second_moment() -> None:
    v = torch.full((1, 64), 1e-20)
    v[0, 0], v[0, 1] = 1.0, 0.0
    got = roundtrip(CODEC, v, False)
    assert got[0, 1] == 0
    assert torch.equal(got[0, 2:], softsign_values(False)[1].expand(62))
    assert 2.5e-7 < got[0, 2] < 2.7e-7


@pytest.mark.parametrize(
    ("kind", "others"), [("normal", ["fp8", "fp8_expand"]), ("log-normal", ["int8", "fp8", "fp8_expand"])]
)
def test_error_of_a_first_moment(kind: str, others: list[str]) -> None:
    """By the root of the mean square, as a part of the state's. int8 is 8 % better on a pure normal one (and not in the
    update, where the small values of a block count too: test_update_error.py)."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(500, 256, generator=g)
    x = x if kind == "normal" else x.sign() * torch.exp(torch.randn(x.shape, generator=g))
    error = {name: ((roundtrip(CODECS[name], x, True) - x).norm() / x.norm()).item() for name in CODECS}
    assert error["int8_softsign"] < min(error[name] for name in others)


def test_rows_of_an_embedding_keep_to_themselves() -> None:
    """Rows of 576 that differ ten-thousandfold: blocks of 64 end with the row, larger ones reach into the next."""
    scale = torch.tensor([1.0, 1e-4]).repeat(20)[:, None]
    m = torch.randn(40, 576, generator=torch.Generator().manual_seed(0)) * scale
    got = roundtrip(CODEC, m, True)
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        assert (got[rows] - m[rows]).norm() < 0.02 * m[rows].norm()


def test_bytes() -> None:
    for signed, scale in ((True, 2), (False, 4)):
        assert CODEC.nbytes(64 * 1000, signed=signed) == 64 * 1000 + scale * 1000
        assert CODEC.nbytes(64 * 1000, signed=signed) / 64_000 < 1 + 12 / 128  # COAT's three fp32 for 128 values
