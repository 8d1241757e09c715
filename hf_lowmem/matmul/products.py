"""The three products of a linear layer from 8-bit codes, one code an operand.

    y  = s (X8 W8ᵀ) r                       X8, s: codes of x (T, K) and a scale for each token
    dX = a (Q_row(g r) W8)                  W8, r: codes of W (N, K) and a scale for each output channel
    dW = b (Q_col(g s)ᵀ X8)                 a, b: the scales that the codes of g get, one for each token or channel

The backward products sum over the channels and over the tokens, which are just the axes that r and s belong to. A
scale inside of a sum cannot be taken out of it, so recipes that scale by row code x and W a second time, along the
other axis, from values that they keep in bf16 for that. Here r and s are multiplied into g before g is coded, and
x and W are multiplied by their codes as they are. So there is one code of x, which serves both of its products, four
casts and not six, and the error is that of the recipe with six: scripts/bench/records/products.jsonl.

All codes are E4M3, those of gradients too. E5M2, which others use for them, has half of its digits, and its range is
not needed: a scale for each token or channel gives E4M3 18 binades below the largest value of each.

`int8_row` is the same with int8, for GPUs without 8-bit floats. Beside a few channels 60 times as large as the others
its steps are too coarse for these. `fp8_tensor` has one scale for the whole of each operand, which can be taken out of
any sum: nothing is multiplied into g, and one code of it serves both products.

What is kept for backward. Where nobody else looks after saved tensors: codes and scales of x, 1 byte a value. Where
somebody does (a tier, a checkpoint, an offloader): x itself is what he is asked to keep, as torch's linear asks him,
since he knows it: a checkpoint drops it, a tier computes it again from what it keeps anyway. So a product never adds a
byte to what a tier keeps. x is then coded anew in backward, from what he gives back.

A weight that is trained is coded at each use, 3 bytes of traffic a weight, which leaves its own precision, its shards
and its optimizer as they are. Of a frozen one the codes can be all that is kept (frozen.py): the same codes, so the
same bits.

Sources: folding: this module. Codes that are saved and multiplied: COAT, arXiv 2410.19313. Scales by row: torchao's
float8 recipes. E4M3's format: arXiv 2209.05433.
"""

import threading
import weakref
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_lowmem.kernels.operands import CODE_COLUMNS, CODE_ROWS, PRODUCT, turn
from hf_lowmem.patching import check_version, version_of
from hf_lowmem.weights import AtRest
from hf_lowmem.weights.forwards import check_writes

__all__ = ["RECIPES", "Recipe", "code_weight", "linear_in_8_bits"]


@dataclass(frozen=True)
class Recipe:
    """Coding of the operands.

    Attributes:
        name: of `lowmem_matmul`.
        fmt: of hf_lowmem.kernels.quantize.GROUPS.
        whole: one scale for the whole of an operand; else one for each row.
    """

    name: str
    fmt: str
    whole: bool = False


RECIPES = {
    recipe.name: recipe
    for recipe in (Recipe("fp8_row", "e4m3"), Recipe("fp8_tensor", "e4m3", whole=True), Recipe("int8_row", "int8"))
}


class Coded(NamedTuple):
    """Codes, turned codes, and scales as `PRODUCT` takes them; codes that were not asked for have no values."""

    codes: Tensor
    turned: Tensor
    scale: Tensor


def code(x: Tensor, recipe: Recipe, layout: str, factor: Tensor | None = None) -> Coded:
    """An operand (rows, columns) in codes; `layout` and `factor`: of `CODE_ROWS`."""
    if not recipe.whole:
        return Coded(*CODE_ROWS(x, factor, None, recipe.fmt, layout))
    largest = torch.linalg.vector_norm(x, torch.inf).float()  # exact in any dtype
    codes, turned, scales = CODE_ROWS(x, None, largest, recipe.fmt, layout)
    return Coded(codes, turned, scales[:1])


def code_weight(weight: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight, of which a product can be made without it."""
    coded = code(weight, recipe, "rows")
    return coded.codes, coded.scale


def units(scale: Tensor, length: int) -> Tensor:
    """Scales of 1 for the other operand: as many as it has rows, or one where `scale` is one."""
    return torch.ones(1 if scale.numel() == 1 else length, dtype=torch.float32, device=scale.device)


class _Lately(threading.local):
    """Codes of the input that was coded last, while that input lives: q, k and v read one, and so do gate and up."""

    of: "weakref.ref[Tensor] | None" = None
    key: tuple[Recipe, int, torch.dtype] | None = None
    coded: Coded | None = None

    def get(self, x: Tensor, key: tuple[Recipe, int, torch.dtype]) -> Coded | None:
        return self.coded if self.of is not None and self.of() is x and self.key == key else None

    def put(self, x: Tensor, key: tuple[Recipe, int, torch.dtype], coded: Coded) -> None:
        self.of, self.key, self.coded = weakref.ref(x, self.forget), key, coded

    def forget(self, of: object = None) -> None:
        if of is None or of is self.of:
            self.of = self.key = self.coded = None


_lately = _Lately()


def code_input(x: Tensor, rows: Tensor, recipe: Recipe) -> Coded:
    """Codes of a linear's input, of which `rows` are the values: those that a linear beside it has made already."""
    if torch.compiler.is_compiling() or x.is_inference():
        return code(rows, recipe, "rows")
    key = recipe, x._version, rows.dtype
    found = _lately.get(x, key)
    if found is None:
        _lately.forget()
        found = code(rows, recipe, "rows")
        _lately.put(x, key, found)
    return found


class Context(Protocol):
    """Place of what a product leaves for its backward."""

    recipe: Recipe
    dtype: torch.dtype
    of_weight: torch.dtype
    coded: bool
    frozen: tuple[Tensor, Tensor, int] | None
    rests: tuple[AtRest, int] | None
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, Tensor, Tensor, Tensor]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


# The name begins with that of torch's own: tiers tell by a node's name whether it mixes values.
class LinearIn8Bits(torch.autograd.Function):
    """x Wᵀ + bias from codes.

    Args of `apply`:
        x: (..., K), bf16, fp16 or fp32, in the dtype that the result shall have.
        weight, bias: (N, K) and (N,), of any of these dtypes. The weight may be codes, of which nothing else is kept.
        recipe: how operands are coded.
        codes, scales: of x, from `code_input`.
        keeps_codes: whether codes of x are kept for backward, and not x.
        of_codes: scales of the weight, where it is codes.
        kept: what is kept of a weight at rest, which is decoded for its two uses.
    """

    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        recipe: Recipe,
        codes: Tensor,
        scales: Tensor,
        keeps_codes: bool,
        of_codes: Tensor | None,
        kept: AtRest | None,
    ) -> Tensor:
        if of_codes is None:
            w, r = code_weight(weight if kept is None else kept.decode(), recipe)
        else:
            w, r = weight, of_codes
        y = PRODUCT(codes, w, scales, r, True, x.dtype)
        if bias is not None:
            y += bias
        ctx.recipe, ctx.dtype, ctx.of_weight = recipe, x.dtype, weight.dtype
        ctx.coded = keeps_codes and ctx.needs_input_grad[1]
        of_x = (None, None) if not ctx.needs_input_grad[1] else (codes, scales) if ctx.coded else (x, None)
        # Codes of a frozen weight are no activation, which an offloader would carry away or a tier count.
        aside = of_codes is not None and not torch.compiler.is_compiling()
        ctx.frozen = (weight, of_codes, version_of(weight)) if aside and of_codes is not None else None
        ctx.rests = None if kept is None else (kept, kept.writes[0])
        saves = ctx.needs_input_grad[0] and not aside and kept is None
        of_weight = (weight, of_codes) if saves else (None, None)
        ctx.save_for_backward(*of_x, *of_weight)
        # A view would hide from tiers that it is as much as a linear's output.
        return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (x, scale, weight, of_codes), recipe = grads, ctx.saved_tensors, ctx.recipe
        if ctx.frozen is not None:
            weight, of_codes, version = ctx.frozen
            check_version(weight, version)
        elif ctx.rests is not None:
            check_writes(*ctx.rests)
            weight = ctx.rests[0].decode() if ctx.needs_input_grad[0] else weight
        shape, g = g.shape, g.reshape(-1, g.shape[-1])
        of_x = of_w = of_bias = None
        # Of one scale in all, both products take the same codes of g.
        shared = code(g, recipe, "both") if recipe.whole else None
        if ctx.needs_input_grad[0]:
            w = code(weight, recipe, "turned") if of_codes is None else Coded(weight, turn(weight), of_codes)
            coded = shared or code(g, recipe, "rows", w.scale)
            other = w.scale if recipe.whole else units(coded.scale, w.turned.shape[0])
            of_x = PRODUCT(coded.codes, w.turned, coded.scale, other, False, ctx.dtype).view(*shape[:-1], -1)
            del w, coded
        if ctx.needs_input_grad[1]:
            if ctx.coded:
                inputs = Coded(x, turn(x), scale)
            else:
                inputs = code(x.reshape(-1, x.shape[-1]), recipe, "turned")
            if shared is None:
                turned, scale = CODE_COLUMNS(g, inputs.scale, recipe.fmt)
                other = units(scale, inputs.turned.shape[0])
            else:
                turned, scale, other = shared.turned, shared.scale, inputs.scale
            of_w = PRODUCT(turned, inputs.turned, scale, other, False, ctx.dtype).to(ctx.of_weight)
        if ctx.needs_input_grad[2]:
            of_bias = g.sum(0)
        return of_x, of_w, of_bias, None, None, None, None, None, None


def linear_in_8_bits(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    recipe: Recipe,
    *,
    of: Tensor,
    keeps_codes: bool,
    of_codes: Tensor | None = None,
    kept: AtRest | None = None,
) -> Tensor:
    """x Wᵀ + bias: see `LinearIn8Bits`. `of`: the tensor that linears beside this one are given as well, whose codes
    they share."""
    with torch.no_grad():
        coded = code_input(of, x.detach().reshape(-1, x.shape[-1]), recipe)
    made = LinearIn8Bits.apply(x, weight, bias, recipe, coded.codes, coded.scale, keeps_codes, of_codes, kept)
    assert isinstance(made, Tensor)
    return made
