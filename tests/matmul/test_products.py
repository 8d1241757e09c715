"""The three products against float64: within bounds that follow from the codes, value by value and as a whole."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_lowmem.kernels.operands.reference import check_layout, turn
from hf_lowmem.kernels.quantize.reference import GROUPS
from hf_lowmem.matmul.products import RECIPES, code, linear_in_8_bits

TOKENS, INPUTS, OUTPUTS = 56, 64, 48  # tokens are no multiple of 16
NAMES = ("y", "dx", "dw")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian() -> tuple[Tensor, Tensor, Tensor]:
    tokens = torch.exp(normal(TOKENS, 1, seed=4))
    return normal(TOKENS, INPUTS), normal(OUTPUTS, INPUTS, seed=1) / 50, normal(TOKENS, OUTPUTS, seed=2) * 1e-4 * tokens


def outlier_channels() -> tuple[Tensor, Tensor, Tensor]:
    x, w, g = gaussian()
    x[:, :4] *= 60
    return x, w, g


def massive_token() -> tuple[Tensor, Tensor, Tensor]:
    x, w, g = gaussian()
    x[0] *= 1000
    return x, w, g


def zero_rows() -> tuple[Tensor, Tensor, Tensor]:
    x, w, g = gaussian()
    x[1], w[2], g[3] = 0, 0, 0
    x[:, 5], w[:, 6], g[:, 7] = 0, 0, 0
    return x, w, g


def denormals() -> tuple[Tensor, Tensor, Tensor]:
    x, w, g = gaussian()
    return x * 2.0**-130, w, g * 2.0**-120


CASES: dict[str, Callable[[], tuple[Tensor, Tensor, Tensor]]] = {
    f.__name__: f for f in (gaussian, outlier_channels, massive_token, zero_rows, denormals)
}


def products(recipe: str, dtype: torch.dtype, case: str, keeps: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """(x, w, g) as rounded to `dtype`, and y, dX, dW from codes."""
    x, w, g = (t.to(dtype) for t in CASES[case]())
    x, w = x.requires_grad_(), w.requires_grad_()
    y = linear_in_8_bits(x, w, None, RECIPES[recipe], of=x, keeps_codes=keeps)
    return [x.detach(), w.detach(), g], [y.detach(), *torch.autograd.grad(y, (x, w), g)]


def error(values: Tensor, scale: Tensor, fmt: str) -> Tensor:
    """The largest error of each value that is coded with a scale: see `Groups`. 2**-20: a scale's inverse, rounded."""
    step = scale / 2 if fmt == "int8" else torch.maximum(values.abs() / 17, scale / 1024)
    return step * (1 + 2.0**-20) + values.abs() * 2.0**-20


def bound(a: Tensor, of_a: Tensor, b: Tensor, of_b: Tensor) -> Tensor:
    """The largest error of a @ b whose factors are off by as much; summed in fp32, rounded to bf16."""
    a, b = a.abs(), b.abs()
    codes = of_a @ b + a @ of_b + of_a @ of_b
    sizes = a @ b + codes
    # 2**-8: two roundings to bf16's eight digits at most. Below bf16's normal range a step is 2**-133.
    return codes + sizes * (a.shape[1] * 2.0**-23 + 2.0**-8) + 2.0**-132


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", RECIPES)
def test_each_product_is_within_the_bound_of_its_codes(name: str, dtype: torch.dtype, case: str) -> None:
    recipe = RECIPES[name]
    operands, got = products(name, dtype, case)
    s, r = (code(t, recipe, "rows").scale.double() for t in operands[:2])
    x, w, g = (t.double() for t in operands)
    s, r = (scale.expand(len(t))[:, None] for scale, t in ((s, x), (r, w)))
    of_x, of_w = error(x, s, recipe.fmt), error(w, r, recipe.fmt)
    folded = (g, g) if recipe.whole else (g * r.t(), g * s)
    top, least = GROUPS[recipe.fmt].top, GROUPS[recipe.fmt].least
    # A scale is rounded up to bf16, by 2**-7 at most.
    over = g.abs().amax() if recipe.whole else None
    a = ((folded[0].abs().amax(1, keepdim=True) if over is None else over) / top * (1 + 2.0**-7)).clamp(min=least)
    b = ((folded[1].abs().amax(0, keepdim=True) if over is None else over) / top * (1 + 2.0**-7)).clamp(min=least)
    wants = x @ w.t(), g @ w, g.t() @ x
    if recipe.whole:
        bounds = (
            bound(x, of_x, w.t(), of_w.t()),
            bound(g, error(g, a, recipe.fmt), w, of_w),
            bound(g.t(), error(g, b, recipe.fmt).t(), x, of_x),
        )
    else:
        bounds = (
            bound(x, of_x, w.t(), of_w.t()),
            bound(folded[0], error(folded[0], a, recipe.fmt), w / r, of_w / r),
            bound(folded[1].t(), error(folded[1], b, recipe.fmt).t(), x / s, of_x / s),
        )
    for what, have, want, most in zip(NAMES, got, wants, bounds, strict=True):
        excess = (have.double() - want).abs() - most
        assert have.isfinite().all(), what
        assert (excess <= 0).all(), f"{what}: {excess.max()} beyond the bound"


@pytest.mark.parametrize("case", ["gaussian", "outlier_channels", "massive_token"])
@pytest.mark.parametrize("keeps", [True, False])
def test_the_whole_is_off_by_a_few_percent(case: str, keeps: bool) -> None:
    """Of two factors that are off by at most 1/17 each and by 2.6 % on average: 4.2 %."""
    (x, w, g), got = products("fp8_row", torch.bfloat16, case, keeps)
    x, w, g = x.double(), w.double(), g.double()
    for what, have, want in zip(NAMES, got, (x @ w.t(), g @ w, g.t() @ x), strict=True):
        assert (have.double() - want).norm() < 0.042 * want.norm(), what


@pytest.mark.parametrize("name", RECIPES)
def test_codes_that_are_kept_are_those_that_would_be_made_again(name: str) -> None:
    for kept, again in zip(
        *(products(name, torch.bfloat16, "gaussian", keeps)[1] for keeps in (True, False)), strict=True
    ):
        assert torch.equal(kept, again)


@pytest.mark.parametrize("name", ["fp8_row", "int8_row"])
def test_a_token_that_is_not_finite_stays_so_and_spoils_no_other(name: str) -> None:
    x, w, g = (t.bfloat16() for t in gaussian())
    clean = linear_in_8_bits(x, w, None, RECIPES[name], of=x, keeps_codes=True)
    spoilt = x.clone()
    spoilt[3, 2] = math.inf
    spoilt, w = spoilt.requires_grad_(), w.requires_grad_()
    y = linear_in_8_bits(spoilt, w, None, RECIPES[name], of=spoilt, keeps_codes=True)
    assert y[3].isnan().all()
    others = torch.arange(TOKENS) != 3
    assert torch.equal(y[others], clean[others])
    assert torch.autograd.grad(y, w, g)[0].isnan().all()


def test_layouts_that_cuda_refuses_are_refused_everywhere() -> None:
    codes = torch.zeros((32, 48), dtype=torch.uint8)
    check_layout(codes, codes)
    for a, b, what in (
        (codes, torch.zeros((48, 32), dtype=torch.uint8).t(), "not contiguous"),
        (codes[:, :40].contiguous(), codes[:, :40].contiguous(), "a multiple of 16"),
        (codes, codes[:24], "a multiple of 16"),
        (codes[:16].view(torch.int8), codes.view(torch.int8), "17 rows or more"),
    ):
        with pytest.raises(ValueError, match=what):
            check_layout(a, b)


def test_turned_codes_are_what_a_kernel_makes() -> None:
    x = gaussian()[0].bfloat16()
    made = code(x, RECIPES["fp8_row"], "both")
    assert torch.equal(turn(made.codes), made.turned)
    assert made.turned.shape == (INPUTS, 64)
