"""int8 codes of weights: nothing moves by itself, rounding at random is unbiased, codes come back from bf16."""

import math

import pytest
import torch
from torch import Tensor

from hf_lowmem.weights import AtRest, int8

GROUP = 128


def contents() -> dict[str, Tensor]:
    """Groups of 128 fp32 values that a weight may have, several of each kind."""
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(64, GROUP, generator=g)
    one = torch.zeros(4, GROUP)
    one[:, 7] = torch.tensor([1.0, -3e-5, 1e30, -(2.0**-60)])
    spread = noise.sign() * 10.0 ** (-30 * torch.rand(64, GROUP, generator=g))
    return {
        "normal": noise * 0.02,
        "positive": 0.02 + noise.abs() * 1e-4,  # a store with a zero point clamps this one to nothing
        "equal": torch.full((4, GROUP), 0.3),
        "zero": torch.zeros(4, GROUP),
        "one value": one,
        "many binades": spread,
        "large": noise / noise.abs().max() * 3.3e38,
        "tiny": noise * 2.0**-110,
        "uniform": torch.rand(64, GROUP, generator=g) * 2 - 1,
    }


def encoded(values: Tensor) -> tuple[Tensor, Tensor]:
    codes = torch.empty(values.numel(), dtype=torch.int8)
    scale = torch.full((values.numel() // GROUP,), int8.TINY)
    int8.encode_(values.reshape(-1), codes, scale, group=GROUP)
    return codes, scale


def values_of(codes: Tensor, scale: Tensor) -> Tensor:
    return int8.decode(codes, scale, codes.shape, torch.float32, group=GROUP)


def test_a_thousand_updates_of_zero_change_nothing() -> None:
    values = torch.cat(list(contents().values()))
    codes, scale = encoded(values)
    before = codes.clone(), scale.clone()
    for step in range(1000):
        int8.encode_(values_of(codes, scale), codes, scale, group=GROUP, seed=step)
    assert torch.equal(codes, before[0])
    assert torch.equal(scale, before[1])


@pytest.mark.parametrize("group", [32, 64])
def test_a_thousand_updates_of_zero_change_nothing_in_smaller_groups(group: int) -> None:
    """As a weight is stepped: decoded, written again with the step's own seed; the bf16 that others see stays too."""
    values = torch.cat(list(contents().values()))[:, : group * 3].reshape(-1, group)
    kept = AtRest("w", values.bfloat16())
    kept.save(kept.load() * 0.7, 0)  # scales that no first encoding would find
    before = [t.clone() for t in (*kept.stored(), kept.decode())]
    for step in range(1000):
        kept.save(kept.load(), step)
    assert all(map(torch.equal, (*kept.stored(), kept.decode()), before))


def test_every_product_of_a_code_and_a_scale_divides_to_the_code() -> None:
    """All scales there are, in one binade: the others are these times a power of two. Nothing is left to draw for."""
    codes = torch.arange(1, 128, dtype=torch.float32)[:, None]
    scale = (torch.arange(1 << 16, dtype=torch.int32) * 128 + (127 << 23)).view(torch.float32)
    assert scale.unique().numel() == 1 << 16
    assert torch.equal((codes * scale) / scale, codes.expand(127, 1 << 16))
    assert torch.equal(int8.scale_of(scale * 127), scale)


@pytest.mark.parametrize("kind", contents())
def test_an_error_is_half_a_code_at_most(kind: str) -> None:
    values = contents()[kind]
    codes, scale = encoded(values)
    largest = values.abs().amax(1)
    assert torch.all(scale >= largest / 127)
    assert torch.all(scale <= (largest / 127 * (1 + 2.0**-15)).clamp(min=int8.TINY))
    error = (values_of(codes, scale).view_as(values) - values).abs()
    # Half a code, and what the quotient rounds to, 2**-24 of 127.
    assert torch.all(error <= scale[:, None] * (0.5 + 2.0**-16))
    assert codes.abs().max() <= 127


@pytest.mark.parametrize("fraction", [0.001, 0.03, 0.5, 0.97])
@pytest.mark.parametrize("code", [-126, -3, 0, 5, 100])
def test_the_expectation_of_a_code_is_the_value(code: int, fraction: float) -> None:
    n = 1 << 17
    codes, scale = torch.zeros(n, dtype=torch.int8), torch.full((n // GROUP,), 2.0**-9)
    codes.view(-1, GROUP)[:, 0] = 127  # which keeps the scale
    values = torch.full((n // GROUP, GROUP), (code + fraction) * 2.0**-9)
    values[:, 0] = 127 * 2.0**-9
    int8.encode_(values.view(-1), codes, scale, group=GROUP, seed=11)
    assert torch.equal(scale, torch.full_like(scale, 2.0**-9))
    found = codes.view(-1, GROUP)[:, 1:].double()
    assert set(found.unique().tolist()) <= {code, code + 1}
    exact = values[0, 1].item() * 2**9
    error = math.sqrt(fraction * (1 - fraction) / found.numel())
    assert abs(found.mean().item() - exact) <= 5 * error


def test_updates_far_below_a_code_arrive() -> None:
    """A hundred updates of a fiftieth of a code: two codes on average, which rounding to nearest would never make."""
    n = 1 << 14
    codes, scale = encoded(torch.full((n // GROUP, GROUP), 0.01).index_fill_(1, torch.tensor([0]), 0.0127))
    start, step = values_of(codes, scale), scale[0].item() / 50
    for seed in range(100):
        values = values_of(codes, scale)
        values.view(-1, GROUP)[:, 1:] += step
        int8.encode_(values, codes, scale, group=GROUP, seed=seed)
    moved = (values_of(codes, scale) - start).view(-1, GROUP)[:, 1:].double() / scale[0].item()
    error = math.sqrt(100 * 0.02 * 0.98 / moved.numel())
    assert abs(moved.mean().item() - 2) <= 5 * error


def test_a_scale_stays_until_a_group_leaves_its_range() -> None:
    values = torch.randn(1, GROUP, generator=torch.Generator().manual_seed(1))
    values /= values.abs().max()
    codes, scale = encoded(values)
    first = scale.clone()
    for factor, stays in ((0.5, True), (0.48, True), (1.0, True), (1.001, False), (0.4, False)):
        codes, scale = encoded(values)
        int8.encode_((values * factor).view(-1), codes, scale, group=GROUP, seed=0)
        assert torch.equal(scale, first) == stays, factor


def test_parts_draw_what_the_whole_would() -> None:
    values = torch.randn(96, GROUP, generator=torch.Generator().manual_seed(2))
    whole, parts = AtRest("w", values.bfloat16()), AtRest("w", values.bfloat16())
    moved = whole.load() + 0.003
    whole.save(moved, 5)
    for start, stop in ((0, 4096), (4096, 96 * GROUP)):
        parts.part(start, stop).save(moved.view(-1)[start:stop], 5, start)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scale, parts.scale)
    assert parts.writes == [3]  # its own first values, and both parts
    rows = whole.part(4096, 96 * GROUP, 64)
    assert torch.equal(rows.load(), whole.load()[32:])
    rows.save(rows.load() + 0.003, 6, 4096)
    flat = parts.part(4096, 96 * GROUP)
    flat.save(flat.load() + 0.003, 6, 4096)
    assert torch.equal(whole.codes, parts.codes)


@pytest.mark.parametrize("kind", contents())
def test_codes_come_back_from_bf16_and_scales(kind: str) -> None:
    values = contents()[kind]
    kept = AtRest("w", values.bfloat16())
    kept.save(kept.load() * 0.37, 3)  # scales that no first encoding would find
    again = AtRest("w", kept.decode(), kept.scale.clone())
    assert torch.equal(again.codes, kept.codes)
    assert torch.equal(again.scale, kept.scale)


def test_scales_of_other_values_are_not_taken() -> None:
    values = torch.randn(8, GROUP, generator=torch.Generator().manual_seed(3)).bfloat16()
    kept = AtRest("w", values, torch.full((8,), 0.5))
    assert torch.equal(kept.scale, AtRest("w", values).scale)
    error = (kept.load() - values.float()).abs()
    assert torch.all(error <= kept.scale[:, None] * 0.51)


@pytest.mark.parametrize(
    ("shape", "group"),
    [((8, 4096), 128), ((8, 576), 64), ((8, 96), 32), ((8, 48), None), ((8, 33), None), ((3, 8, 256), 128)],
)
def test_groups_divide_rows(shape: tuple[int, ...], group: int | None) -> None:
    assert int8.group_of(torch.Size(shape)) == group
    if group is not None:
        kept = AtRest("w", torch.randn(shape).bfloat16())
        assert sum(t.nbytes for t in kept.stored()) == int8.nbytes(math.prod(shape), group)


def test_some_rows_are_those_of_the_whole() -> None:
    kept = AtRest("w", torch.randn(50, 96, generator=torch.Generator().manual_seed(4)).bfloat16())
    rows = torch.tensor([3, 3, 49, 0])
    assert torch.equal(kept.rows(rows), kept.decode()[rows])
