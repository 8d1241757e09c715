"""The codecs' tables, and the way from a codec to its kernel. The kernels on all their cases: test_contract.py."""

import io

import pytest
import torch
from torch import Tensor

from hf_lowmem.codecs import CODECS, Dither, KernelCodec
from hf_lowmem.kernels import exact, use_kernels
from hf_lowmem.kernels.codecs import DECODE_STATE, ENCODE_STATE, reference, tables, through_op
from hf_lowmem.kernels.codecs.weights import round_stochastic
from hf_lowmem.kernels.exact import E4M3_MAX
from hf_lowmem.kernels.registry import has_numba

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = [name for name, codec in CODECS.items() if isinstance(codec, KernelCodec)]
each_kind = pytest.mark.parametrize(("name", "signed"), [(n, s) for n in NAMES for s in (True, False)])


def data(shape: tuple[int, ...], signed: bool) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator) * torch.exp(2 * torch.randn(shape, generator=generator))
    return (x if signed else x.square()).to(DEVICE)


def test_every_codec_with_a_reference_here_has_a_class() -> None:
    assert set(NAMES) == set(reference.CODECS)


@each_kind
@pytest.mark.parametrize("shape", [(), (3, 200), (0, 7)], ids=str)
def test_a_codec_s_state_is_the_same_from_either(name: str, signed: bool, shape: tuple[int, ...]) -> None:
    codec, x = CODECS[name], data(shape, signed)
    encoded, decoded = [], []
    for impl in ("reference", "triton"):
        with use_kernels(impl):
            enc = codec.init(x, signed=signed)
            codec.encode_(enc, x.mT if x.dim() == 2 else x)  # strides that no kernel takes
            decoded.append(codec.decode(enc, x.shape))
            encoded.append(enc)
    assert all(torch.equal(v, encoded[1][k]) for k, v in encoded[0].items())
    assert torch.equal(*decoded)


@each_kind
def test_a_nan_or_an_inf_spoils_its_block_alone(name: str, signed: bool) -> None:
    """On a GPU a bad step is made and then undone: nothing may be read or written beside its place meanwhile."""
    codec, x = CODECS[name], data((4, 256), signed)
    for bad in (float("nan"), float("inf")):
        spoiled = x.clone()
        spoiled[1, 7] = bad
        for impl in ("reference", "triton"):
            with use_kernels(impl):
                enc = codec.init(x, signed=signed)
                codec.encode_(enc, x)
                want = codec.decode(enc, x.shape)
                codec.encode_(enc, spoiled)
                got = codec.decode(enc, x.shape)
            assert torch.equal(got[[0, 2, 3]], want[[0, 2, 3]])


def test_on_a_cpu_only_a_forced_triton_passes_the_operator() -> None:
    x = torch.ones(3)
    assert not through_op(x)
    with use_kernels("reference"):
        assert not through_op(x)
    with use_kernels("triton"):
        assert through_op(x)
        assert torch.compile(lambda x: x + through_op(x), backend="eager", fullgraph=True)(x).equal(x)
    assert through_op(torch.ones(3, device="meta"))


@each_kind
@pytest.mark.parametrize("dither", [None, Dither(2**40 + 1, 7)], ids=["nearest", "random"])
def test_the_operators_in_one_compiled_graph(name: str, signed: bool, dither: Dither | None) -> None:
    torch.compiler.reset()
    x = data((300,), signed)
    enc = CODECS[name].init(x, signed=signed)
    codes, scalars = enc["codes"], [v for k, v in enc.items() if k != "codes"]

    seed, offset = dither or (None, 0)

    def step(x: Tensor, codes: Tensor, scalars: list[Tensor]) -> Tensor:
        ENCODE_STATE(x * 2, codes, scalars, name, signed, seed, offset)
        return DECODE_STATE(codes, scalars, name, signed) + 1

    got = torch.compile(step, backend="aot_eager", fullgraph=True)(x, codes, scalars)
    want_enc = CODECS[name].init(x, signed=signed)
    CODECS[name].encode_(want_enc, x * 2, dither)
    assert torch.equal(codes, want_enc["codes"])
    assert torch.equal(got, CODECS[name].decode(want_enc, x.shape) + 1)


def where_in_rows(bits: torch.Tensor, nearest: bool, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The entry of each of the bits, (256, any), one row a power, and the bits clamped; `count`: of all entries."""
    shift, first, offset = tables.expanding_rows(nearest).long().unsqueeze(-1).unbind(1)
    clamped = torch.maximum(bits, first).clamp_(max=tables.LARGEST_BITS)
    place = (clamped >> shift) + offset
    last = torch.cat([(first >> shift)[1:] + offset[1:], torch.tensor([[count]])])
    assert (place >= (first >> shift) + offset).all()
    assert (place < last).all(), "a row ends where the next one begins"
    return place, clamped


def around(thresholds: torch.Tensor) -> torch.Tensor:
    """Each, one unit in the last place below and above, and both ends of what is clamped."""
    ends = torch.tensor([0, 1, tables.LARGEST_BITS, tables.LARGEST_BITS + 1, 0x7F800000, 0x7FC00000])
    return torch.cat([(thresholds[:, :, None] + torch.arange(-1, 2)).view(256, -1), ends.expand(256, -1)], 1)


def test_expanding_finds_the_code_at_every_threshold_of_every_power() -> None:
    thresholds, table = tables.expanding_thresholds(nearest=True), tables.expanding_table().long()
    bits = around(thresholds)  # (256, 126)
    place, clamped = where_in_rows(bits, True, table.numel())
    got = (table[place] + clamped) >> tables.expanding_rows(nearest=True).long()[:, :1]
    assert torch.equal(got, torch.searchsorted(thresholds, bits, right=True))


@pytest.mark.parametrize("signed", [True, False])
def test_a_cell_gives_the_place_of_every_value_of_every_power(signed: bool) -> None:
    """At each code's value its code, and beside it nothing else; between two of them linear, or nearly a logarithm."""
    thresholds, cells = tables.expanding_thresholds(nearest=False), tables.expanding_cells(signed)
    values = thresholds.int().view(torch.float32).double()
    part = torch.rand(256, 125, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    between = (values[:, :-1, None] + part * values.diff(dim=1)[:, :, None]).flatten(1)
    for bits in (thresholds, around(thresholds)[:, :-4], tables.bits_of(between)):
        where, _ = where_in_rows(bits, False, len(cells))
        start, slope, bend, anchor = cells[where].unbind(-1)
        q = bits.int().view(torch.float32)
        d = q - anchor
        place = exact.fma(d.clamp(max=0.0), bend, exact.fma(d, slope, start)).double() - tables.CELL_ORIGIN
        code = torch.searchsorted(thresholds, bits.contiguous(), right=True)
        low, high = values.gather(1, (code - 1).clamp(min=0)), values.gather(1, code.clamp(max=125))
        x, least = q.double(), 0.0 if signed else 1.0
        part = (x - low) / (high - low) if signed else (x / low).log() / (high / low).log()
        want = torch.where(code == 0, x / high if signed else least, code + torch.where(code < 126, part, 0.0))
        # A cell is half a gap at most, and a chord of half of it goes on to a quarter of the cell's width squared.
        off = 0.0 if signed else (high / low).log() / 16
        assert ((place - want).abs() <= off + 2.0**-15).all()
        assert (place >= least).all()
        assert (place <= 126).all()
        if bits is thresholds:
            assert ((place - want).abs() <= (0.0 if signed else 2.0**-16)).all(), "a code's own value is that code"


def test_a_second_moment_rises_as_readily_as_it_falls() -> None:
    """A thousandth above and below each code, of every power: the slopes that a long average sees are the logarithm's.

    Where a code's value is within a thousandth of its cell's end the next cell's whole chord decides: a quarter of a
    gap. Chords of cells as wide as a gap, no halves, were off by half of it, one up, one down, and the updates of
    20,000 steps at beta2 = 0.999 by 0.7 %.
    """
    thresholds, cells = tables.expanding_thresholds(nearest=False), tables.expanding_cells(False)
    values = thresholds.int().view(torch.float32).double()
    code, gaps, off = torch.arange(2, 126), values.log().diff(dim=1), []
    for part, gap in ((1 + 2.0**-10, gaps[:, 1:]), (1 - 2.0**-10, gaps[:, :-1])):
        bits = tables.bits_of(values[:, 1:-1] * part)
        q = bits.int().view(torch.float32)
        where, _ = where_in_rows(bits, False, len(cells))
        start, slope, bend, anchor = cells[where].unbind(-1)
        d = q - anchor
        moved = (
            exact.fma(d.clamp(max=0.0), bend, exact.fma(d, slope, start)).double() - tables.CELL_ORIGIN - code
        ) * gap
        want = (q.double() / values[:, 1:-1]).log()
        off.append(moved / want - 1)
        # 2**-16 of a place: the last digit of one.
        assert (off[-1].abs() <= gap / 4 + 2.0**-16 * gap / want.abs()).all()
    assert ((off[1] - off[0]).mean(1) <= gaps.mean(1) / 8).all()


@pytest.mark.parametrize("power", [0, 37, tables.POWER_OF_ONE, 200, 255])
def test_a_threshold_is_where_torch_s_cast_turns(power: int) -> None:
    """In fp64, a part in 2**20 below and above: the power law, then torch's own cast to E4M3."""
    k = tables.exponents()[power]
    r = tables.expanding_thresholds(nearest=True)[power].int().view(torch.float32).double()
    codes = torch.arange(1, tables.LARGEST_CODE + 1, dtype=torch.uint8)
    for side, want in ((1 - 2.0**-20, codes - 1), (1 + 2.0**-20, codes)):
        q = ((r * side) ** k * E4M3_MAX).float().clamp(max=E4M3_MAX)
        assert torch.equal(q.to(torch.float8_e4m3fn).view(torch.uint8), want)


@pytest.mark.parametrize("signed", [True, False])
def test_a_power_is_the_nearest_step(signed: bool) -> None:
    ratio = torch.exp2(torch.linspace(0.02, 120, 5000, dtype=torch.float64)).float()
    binades = tables.SIGNED_BINADES if signed else tables.UNSIGNED_BINADES
    ideal = (binades / ratio.double().log2()).log2() * tables.POWERS_PER_OCTAVE + tables.POWER_OF_ONE
    bits = ratio.view(torch.int32)
    got = 255 - ((tables.power_table(signed)[bits >> 16] + (bits & 0xFFFF)) >> 16)
    assert torch.equal(got, 255 - torch.searchsorted(tables.power_thresholds(signed), ratio))
    # Half a step, and what rounding a threshold to fp32 moves it: log2 by 2**-24 / ln 2 of at least 2.6 binades.
    assert ((got - ideal.clamp(0, 255)).abs() <= 0.5 + 60 * 2.0**-24).all()


def test_the_second_moment_of_a_softsign_takes_the_nearest_step() -> None:
    u = torch.rand(100_000, generator=torch.Generator().manual_seed(0)).square()
    x = torch.cat(
        [torch.ones(u.shape[0] // 63 + 1, 1), torch.nn.functional.pad(u, (0, -u.numel() % 63)).view(-1, 63)], 1
    )
    codes, scale = reference.softsign_encode(x, False, None)
    assert (scale == 1).all()
    root = x.double().sqrt()
    y = (1 + tables.SOFTNESS) * root / (root + tables.SOFTNESS) * tables.STEPS[False]
    # A threshold is rounded to fp32, 2**-24 of u: less than 2**-17 of a step, as y is steepest at 255 steps.
    assert ((codes - y).abs() <= torch.where(x > 0, 0.5 + 2.0**-17, 0)).logical_or(codes == 1).all()


def test_packed_tables_have_room_for_one_threshold_an_interval() -> None:
    for nearest in (True, False):
        rows = tables.expanding_rows(nearest).long()
        assert (tables.expanding_thresholds(nearest).diff(dim=1) >= 1 << rows[:, :1]).all()
        reached = (torch.arange(1, 256, dtype=torch.float64) - 0.5 * nearest) / 255
        assert (tables.bits_of(tables.softsign_inverse(reached).square()).diff() >= 1 << 16).all()
    for signed in (True, False):
        assert (tables.bits_of(tables.power_thresholds(signed)).diff() >= 1 << 16).all()


def test_random_rounding_is_a_function_of_seed_and_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither spans nor strides nor what lies beside a value show."""
    x = data((50, 60), True)
    whole = round_stochastic(x, 2**40 + 7)
    assert torch.equal(round_stochastic(x.reshape(-1)[:1700], 2**40 + 7), whole.view(-1)[:1700])
    assert torch.equal(round_stochastic(x.T.contiguous().T, 2**40 + 7), whole)
    monkeypatch.setattr("hf_lowmem.kernels.spans.CPU_SPAN_PER_THREAD", 17)
    assert torch.equal(round_stochastic(x, 2**40 + 7), whole)


def test_a_state_of_either_is_saved_and_loaded_alike() -> None:
    x = data((700,), False)
    files = []
    for impl in ("reference", "triton"):
        with use_kernels(impl):
            enc = CODECS["fp8_expand"].init(x, signed=False)
            CODECS["fp8_expand"].encode_(enc, x)
        files.append(io.BytesIO())
        torch.save(enc, files[-1])
    assert files[0].getvalue() == files[1].getvalue()


@pytest.mark.skipif(not has_numba(), reason="numba is not installed: pip install 'hf-lowmem[cpu]'")
def test_on_a_cpu_the_values_of_softsign_need_no_table() -> None:
    from hf_lowmem.kernels.codecs.cpu_decode import softsign_value

    found = torch.tensor([float(softsign_value.py_func(code)) for code in range(-127, 128)])
    table = tables.SOFTSIGN_VALUES[True].on(torch.device("cpu"))
    assert torch.equal(found, table.roll(127)[:255])
