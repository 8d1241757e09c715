"""The device functions against torch and against exact.py: every code, every bf16, a million fp32, every tie."""

# pyright: reportCallIssue=false, reportArgumentType=false
# It reads the Python, not the language that @triton.jit makes of it.

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowmem.kernels import _device as device_functions
from hf_lowmem.kernels import _groups as group_functions
from hf_lowmem.kernels import exact
from hf_lowmem.kernels.glu import reference as glu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK = 1 << 15

e4m3_nearest, e4m3_stochastic, e4m3_decode = (
    group_functions.e4m3_nearest,
    group_functions.e4m3_stochastic,
    group_functions.e4m3_decode,
)
int8_nearest, int8_stochastic = group_functions.int8_nearest, group_functions.int8_stochastic
clip, load_fp32, store_rounded = device_functions.clip, device_functions.load_fp32, device_functions.store_rounded
random_word, div, sqrt = device_functions.random_word, device_functions.div, device_functions.sqrt
reciprocal, root_of, exp_short = device_functions.reciprocal, device_functions.root_of, device_functions.exp_short
grouped_word, grouped_words = device_functions.grouped_word, device_functions.grouped_words
int8_values = group_functions.int8_values
round_bf16_up, from_bits, magnitude = (
    device_functions.round_bf16_up,
    device_functions.from_bits,
    device_functions.magnitude,
)


@triton.jit
def encode_kernel(x_ptr, word_ptr, out_ptr, n, WHAT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    x = load_fp32(x_ptr + at, mask)
    word = tl.load(word_ptr + at, mask=mask, other=0).to(tl.uint32)
    if WHAT == "e4m3":
        code = e4m3_nearest(clip(x, 448.0))
    elif WHAT == "e4m3 stochastic":
        code = e4m3_stochastic(clip(x, 448.0), word)
    elif WHAT == "int8":
        code = int8_nearest(clip(x, 127.0))
    else:
        code = int8_stochastic(clip(x, 127.0), word)
    tl.store(out_ptr + at, code, mask=mask)


@triton.jit
def map_kernel(x_ptr, y_ptr, out_ptr, n, WHAT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    if WHAT == "decode":
        value = e4m3_decode(tl.load(x_ptr + at, mask=mask, other=0))
    else:
        value = load_fp32(x_ptr + at, mask)
        if WHAT == "div":
            value = div(value, load_fp32(y_ptr + at, mask))
        elif WHAT == "sqrt":
            value = sqrt(value)
        elif WHAT == "up":
            value = round_bf16_up(value)
        elif WHAT == "abs":
            value = from_bits(magnitude(value).to(tl.uint32))
    store_rounded(out_ptr + at, value, mask)


@triton.jit
def short_kernel(x_ptr, out_ptr, WHAT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    if WHAT == "reciprocal":
        y = reciprocal(x)
    elif WHAT == "root":
        y = root_of(x)
    elif WHAT == "exp":
        y = exp_short(x)
    else:
        y = int8_values(x)
    tl.store(out_ptr + at, y)


@triton.jit(do_not_specialize=["start", "k0", "k1", "flip"])
def grouped_kernel(
    tile_ptr, each_ptr, start, k0, k1, flip, ROWS: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr
):
    at = tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    start = start.to(tl.int64)
    tl.store(tile_ptr + at, grouped_words(start, k0, k1, flip.to(tl.uint32), ROWS, WIDTH, ALIGNED).to(tl.int32))
    tl.store(each_ptr + at, grouped_word(start + at, flip.to(tl.uint32) * 0, k0, k1).to(tl.int32))


@triton.jit(do_not_specialize=["k0", "k1"])
def random_kernel(out_ptr, start, k0, k1, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, random_word(start + at.to(tl.int64), k0, k1).to(tl.int32), mask=at < n)


def encode(what: str, x: Tensor, word: Tensor | None = None) -> Tensor:
    out = torch.full_like(x, 0x55, dtype=torch.uint8 if "e4m3" in what else torch.int8)
    word = torch.zeros_like(x, dtype=torch.int32) if word is None else word
    encode_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, word, out, x.numel(), WHAT=what, BLOCK=BLOCK)
    return out


def apply(what: str, x: Tensor, y: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.full(x.shape, torch.nan, dtype=dtype, device=x.device)
    grid = (triton.cdiv(x.numel(), BLOCK),)
    map_kernel[grid](x, x if y is None else y, out, x.numel(), WHAT=what, BLOCK=BLOCK, enable_fp_fusion=False)
    return out


def all_bf16(nan: bool = False) -> Tensor:
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).to(DEVICE)
    assert x.numel() == 65536
    return x if nan else x[~x.isnan()]


def million(limit: int = 0x7F800000) -> Tensor:
    """fp32 of every exponent below that of the bits `limit`, both signs."""
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(0, limit, (1_000_000,), generator=g, dtype=torch.int32)
    sign = torch.randint(0, 2, (1_000_000,), generator=g, dtype=torch.int32) << 31
    return (bits | sign).view(torch.float32).to(DEVICE)


def around(points: Tensor) -> Tensor:
    """Each point with the 3 nearest fp32 on either side, both signs."""
    bits = points.float().view(torch.int32)[:, None] + torch.arange(-3, 4, dtype=torch.int32, device=points.device)
    x = bits.clamp(min=0).view(torch.float32).flatten()
    return torch.cat([x, -x])


def e4m3_points() -> Tensor:
    values = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return torch.cat([values, (values[1:] + values[:-1]) / 2]).to(DEVICE)


INPUTS: dict[str, Callable[[], Tensor]] = {
    "all bf16": all_bf16,
    "a million fp32": million,
    "a million fp32 in range": lambda: million(0x43E00000),
    "ties and codes": lambda: around(e4m3_points()),
}


@pytest.mark.parametrize("values", INPUTS)
def test_e4m3_is_torchs_cast_with_saturation(values: str) -> None:
    """Triton's integers, and the reference's."""
    x = INPUTS[values]()
    want = x.float().clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(encode("e4m3", x), want)
    assert torch.equal(exact.e4m3_codes(x.float().clamp(-448, 448)), want)


def test_every_e4m3_code_decodes_to_its_value() -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    want = codes.view(torch.float8_e4m3fn).float()
    assert want.isnan().sum() == 2
    for got in (apply("decode", codes), exact.e4m3_halves(codes) * 256):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(got.signbit()[~want.isnan()], want.signbit()[~want.isnan()])  # -0, too
    assert torch.equal(exact.e4m3_halves(codes[~want.isnan()], nans=False) * 256, want[~want.isnan()])


@pytest.mark.parametrize("values", INPUTS)
def test_stochastic_e4m3_is_the_reference_and_one_of_the_two_neighbours(values: str) -> None:
    x = INPUTS[values]().float().clamp(-448, 448)
    word = exact.random_bits(3, 0, x.numel(), DEVICE)
    got = encode("e4m3 stochastic", x, word)
    assert torch.equal(got, exact.e4m3_codes(x, word))
    # Noise of all zeros gives the lower neighbour; all ones the upper, or x itself.
    lower, upper = (encode("e4m3 stochastic", x, torch.full_like(word, w)) for w in (0, -1))
    assert ((got == lower) | (got == upper)).all()
    assert (upper.int() - lower.int()).unique().tolist() == [0, 1]
    value = lower.view(torch.float8_e4m3fn).float()
    assert (value.abs() <= x.abs()).all()


def test_int8_rounds_to_even() -> None:
    ties = torch.arange(-127, 127, device=DEVICE) + 0.5
    x = torch.cat([around(ties[ties > 0]), million(0x42FE0000), all_bf16().float()])  # 0x42FE0000: 127
    assert torch.equal(encode("int8", x), x.clamp(-127, 127).round().to(torch.int8))
    word = exact.random_bits(5, 0, x.numel(), DEVICE)
    y = x.clamp(-127, 127)
    want = (y.double() * 2.0**24).trunc().add(word.bitwise_and(0xFFFFFF)).div(2.0**24).floor().to(torch.int8)
    assert torch.equal(encode("int8 stochastic", x, word), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_loads_and_stores_round_as_torch_does(dtype: torch.dtype) -> None:
    """Every 16-bit pattern; and fp32 narrowed, ties and denormals and overflows among them."""
    x = torch.cat([all_bf16(nan=True).float(), million(), around(e4m3_points() * 2.0**-24)])
    torch.testing.assert_close(apply("copy", x, dtype=dtype), x.to(dtype), rtol=0, atol=0, equal_nan=True)
    back = x.to(dtype)
    torch.testing.assert_close(apply("copy", back), back.float(), rtol=0, atol=0, equal_nan=True)


def test_bf16_halfway_goes_to_even_and_up_goes_up() -> None:
    finite = all_bf16().float()
    finite = finite[finite.isfinite()]
    halfway = (finite.view(torch.int32) + 0x8000).view(torch.float32)
    for x in (halfway, million(0x7F7F0000)):
        assert torch.equal(apply("copy", x, dtype=torch.bfloat16), x.bfloat16())
        inside = x[x.abs() <= exact.BF16_MAX]
        assert torch.equal(exact.round_bf16(inside), inside.bfloat16().float())
        up = apply("up", inside)
        assert torch.equal(up, exact.round_bf16_up(inside))
        below = (up.view(torch.int32) - 0x10000).view(torch.float32)
        assert (up.abs() >= inside.abs()).all()
        assert ((below.abs() < inside.abs()) | (inside == 0)).all()


def test_division_and_root_are_rounded_once() -> None:
    """fp64 has more than twice the digits of fp32, so that its rounded quotient or root rounds to the right fp32."""
    x, y = million(), million().flip(0)
    want = (x.double() / y.double()).float()
    torch.testing.assert_close(apply("div", x, y), want, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(exact.divide(x, 448.0), (x.double() / 448).float(), rtol=0, atol=0)
    want = x.abs().double().sqrt().float()
    assert torch.equal(apply("sqrt", x.abs()), want)
    assert torch.equal(exact.sqrt(x.abs()), want)
    assert torch.equal(apply("abs", x), x.abs())


def short(what: str, x: Tensor) -> Tensor:
    out = torch.full(x.shape, torch.nan, device=DEVICE)
    block = min(BLOCK, x.numel())
    short_kernel[(x.numel() // block,)](x, out, WHAT=what, BLOCK=block, enable_fp_fusion=False)
    return out


@pytest.mark.parametrize("exponent", [-126, -125, -101, -100, -37, -1, 0, 1, 63, 124])
def test_short_reciprocals_and_roots_are_rounded_once(exponent: int) -> None:
    """All mantissas of a binade. On a CUDA device this is the proof that its approximations carry the short forms.

    The interpreter has none: it divides as numpy does, and every 61st shows that.
    """
    every = 1 if DEVICE.type == "cuda" else 61
    x = torch.arange(0, 1 << 23, every, dtype=torch.int32, device=DEVICE)[: (1 << 23) // every // BLOCK * BLOCK]
    x = x.add_((exponent + 127) << 23).view(torch.float32)
    wide = x.double()
    assert torch.equal(short("reciprocal", x), (1 / wide).float())
    assert torch.equal(short("reciprocal", -x), (-1 / wide).float())
    if exponent >= -101:
        assert torch.equal(short("root", x), wide.sqrt().float())


def test_a_short_exponential_is_the_reference_and_close() -> None:
    x = torch.linspace(-90, 90, 1 << 17, device=DEVICE)
    got = short("exp", x)
    assert torch.equal(got, glu.exp_short(x))
    want = x.double().clamp(-86, 86).exp()
    assert (((got - want) / want).abs() < 2.0**-21.5 + x.abs() * 2.0**-23).all()


def test_integers_of_a_byte_are_exact() -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(torch.int8)
    assert torch.equal(short("int8", codes), codes.float())


@pytest.mark.parametrize("start", [0, 2**31 - 64, 2**37 - 64, 2**40 + 6])
@pytest.mark.parametrize("flip", [0, -1])
@pytest.mark.parametrize("width", [16, 32])
def test_neighbours_share_a_hash(start: int, flip: int, width: int) -> None:
    tile, each = (torch.zeros(8, width, dtype=torch.int32, device=DEVICE) for _ in range(2))
    aligned = start % exact.GROUP == 0
    grouped_kernel[(1,)](tile, each, start, *exact.seed_keys(5), flip, ROWS=8, WIDTH=width, ALIGNED=aligned)
    want = exact.grouped_bits(5, start, start + 8 * width, DEVICE)
    assert torch.equal(tile.view(-1), want ^ flip)
    assert torch.equal(each.view(-1), want)
    assert torch.equal(exact.grouped_bits(5, start + 3, start + 8, DEVICE), want[3:8])
    assert torch.equal(want[1::2], exact.rotate_half(want[::2]))


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**62 + 12345])
@pytest.mark.parametrize("start", [0, 2**31 - 3, 2**32 - 3, 2**40 + 7])
def test_random_bits_are_the_reference(seed: int, start: int) -> None:
    out = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    random_kernel[(1,)](out, start, *exact.seed_keys(seed), 64, BLOCK=64)
    assert torch.equal(out, exact.random_bits(seed, start, start + 64, DEVICE))
