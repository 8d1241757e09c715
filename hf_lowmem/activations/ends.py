"""Norms beside the stack of layers, in tiles of tokens, where layers keep their inputs only.

A layer that is run again in backward keeps 1 U (tokens x hidden x 2 bytes), or half of one. The last norm, which is
in no layer, keeps more than several of them: Llama's its input in fp32 (2 U), its output before the weight, and the
statistics; in passing it makes 4 U. So it runs here on one tile of tokens after another, keeps its input, which is
there anyway, and runs on each tile again in backward.

It is one autograd Function whose inputs are the hidden states and the norm's own parameters. A checkpoint for each tile
would do the same with a slice for each, whose backward pass fills a tensor of all tokens with zeros, and would add up
the weight's gradient in the weight's dtype; here it is summed in fp32, and handed over once.

Which module may run so is found out by trying, on rows that are made for it: each row of the output must depend on that
row of the input alone, to the bit, wherever it stands.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from hf_lowmem.activations.aside import check_first_derivative, reason_to_step_aside
from hf_lowmem.activations.blocks import Patch, eager
from hf_lowmem.activations.draws import undrawn
from hf_lowmem.activations.report import Report
from hf_lowmem.activations.tape import is_plain
from hf_lowmem.specs import INPUT_TIERS

__all__ = ["NO_NORM", "TILE", "TiledNorm", "norms_beside"]

TILE = 8192  # tokens; of as many or fewer the norm runs as it is
NO_NORM = (
    f"no norm beside the layers was seen to work row by row: of more than {TILE:,} tokens it keeps all that it saves"
)


def norms_beside(model: nn.Module, report: Report) -> "list[TiledNorm] | None":
    """The tiled forwards, not put on yet, of a converted model's norms; None where no layer keeps its input only."""
    names = [layer.name for layer in report.layers if layer.tier in INPUT_TIERS]
    if not names:
        return None
    stack = names[0].rpartition(".")[0]
    beside = model.get_submodule(stack.rpartition(".")[0]).named_children()
    return [TiledNorm(child) for name, child in beside if name != stack.rpartition(".")[2] and _by_rows(child)]


class TiledNorm(Patch):
    """A norm of many tokens, which keeps its input."""

    @eager
    def __call__(self, *args: object, **kwargs: object) -> object:
        x = args[0] if len(args) == 1 and not kwargs else None
        parameters = list(self.module.parameters(recurse=False))
        if not isinstance(x, Tensor) or not self.module.training or x.numel() <= TILE * x.shape[-1]:
            return self.original(*args, **kwargs)
        if not all(map(is_plain, (x, *parameters))) or reason_to_step_aside() is not None:
            return self.original(*args, **kwargs)
        return _ByTiles.apply(self, x, *parameters)

    def run(self, rows: Tensor) -> Tensor:
        """The norm of (tokens, hidden)."""
        return self.original(rows[None])[0]

    @contextlib.contextmanager
    def with_parameters(self, leaves: list[Tensor]) -> Iterator[None]:
        """Tensors in the place of the parameters, whose hooks must not see the gradient of a tile."""
        before = dict(self.module._parameters)
        given = dict(zip((n for n, p in before.items() if p is not None), leaves, strict=True))
        try:
            cast(dict[str, Tensor], self.module._parameters).update(given)
            yield
        finally:
            self.module._parameters.update(before)


class _Context(Protocol):
    """Context of `_ByTiles`. `autocast`: whether it was on in the forward pass, and its dtype."""

    norm: TiledNorm
    device: str
    autocast: tuple[bool, torch.dtype]
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _ByTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, norm: TiledNorm, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.norm, ctx.device = norm, x.device.type
        ctx.autocast = torch.is_autocast_enabled(ctx.device), torch.get_autocast_dtype(ctx.device)
        ctx.save_for_backward(x, *parameters)
        rows, y = _rows(x), None
        for tile in _tiles(len(rows)):
            part = norm.run(rows[tile])
            y = torch.empty_like(rows, dtype=part.dtype) if y is None else y
            y[tile] = part
        assert y is not None
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        norm = ctx.norm
        check_first_derivative(
            type(norm.module).__name__, "it runs by tiles, each with a graph of its own that is gone"
        )
        x, *parameters = ctx.saved_tensors
        _, wants, *needed = ctx.needs_input_grad
        leaves = [p.detach().requires_grad_(need) for p, need in zip(parameters, needed, strict=True)]
        inputs = [leaf for leaf in leaves if leaf.requires_grad]
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in inputs]
        rows, grads = _rows(x), _rows(grad)
        dx = torch.empty_like(rows) if wants else None
        enabled, dtype = ctx.autocast
        cast = torch.autocast(ctx.device, dtype=dtype, enabled=enabled, cache_enabled=False)
        with norm.with_parameters(leaves), torch.enable_grad(), cast:
            for tile in _tiles(len(rows)):
                part = rows[tile].detach().requires_grad_(wants)
                found = torch.autograd.grad(norm.run(part), [*([part] if wants else []), *inputs], grads[tile])
                if dx is not None:
                    dx[tile] = found[0]
                for total, one in zip(sums, found[-len(sums) :] if sums else (), strict=True):
                    total += one
        given = iter(total.to(p.dtype) for total, p in zip(sums, inputs, strict=True))
        return None, None if dx is None else dx.view(x.shape), *(next(given) if need else None for need in needed)


def _rows(x: Tensor) -> Tensor:
    """(tokens, hidden): a view where strides allow it."""
    return x.reshape(-1, x.shape[-1])


def _tiles(count: int) -> Iterator[slice]:
    """Tiles of at least TILE tokens, less than two: a sum of a few rows may be made in another order."""
    whole = max(count // TILE, 1)
    for i in range(whole):
        yield slice(i * TILE, count if i == whole - 1 else (i + 1) * TILE)


def _by_rows(module: nn.Module) -> bool:
    """Whether a module is a norm that may run on some rows at a time. Its own weights are not read."""
    named = list(module.named_parameters(recurse=False))
    held = any(True for _ in module.children()) or any(True for _ in module.buffers())
    if held or any(p.ndim != 1 for _, p in named):
        return False
    width = named[0][1].numel() if named else (getattr(module, "normalized_shape", None) or (0,))[-1]
    if not width or isinstance(module, nn.Dropout):
        return False
    with unset_fake_temporarily(), _disable_current_modes(), torch.no_grad():
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)

        twin = copy.copy(module)
        vars(twin)["_parameters"] = {name: nn.Parameter(draw(p.numel()), requires_grad=False) for name, p in named}
        vars(twin)["training"] = True
        x, forward = draw(1, 7, width), type(module).forward
        try:
            with undrawn(x.device) as draws:
                whole, parts = forward(twin, x.clone()), [forward(twin, x[:, a:b].clone()) for a, b in ((0, 3), (3, 7))]
                drawn = draws.settle()
        except Exception:  # whatever a module of another kind does with these
            return False
        alike = isinstance(whole, Tensor) and whole.shape == x.shape and not drawn
        return alike and torch.equal(whole, torch.cat(parts, 1)) and not torch.equal(whole, x)
