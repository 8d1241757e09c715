"""Errors of the three products beside torchao's recipes, against float64, on inputs that bite."""

import dataclasses
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import cast

import torch
from torch import Tensor, nn

from hf_lowmem.matmul.products import RECIPES, linear_in_8_bits
from parts.record import Row, Rows

TOKENS, INPUTS, OUTPUTS = 2048, 512, 384
Products = tuple[Tensor, Tensor, Tensor]


def inputs(tokens: int, inputs: int, outputs: int) -> Iterator[tuple[str, Products]]:
    """(what, (x, w, g)) in bf16."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    x, w = normal(tokens, inputs), normal(outputs, inputs) * 0.02
    g = normal(tokens, outputs) * 1e-4 * torch.exp(normal(tokens, 1))
    outliers = x.clone()
    outliers[:, :8] *= 60
    massive = x * torch.exp(1.5 * normal(tokens, 1))
    massive[0] *= 1000
    for what, found in (
        ("gaussian, gradients log-normal over tokens", (x, w, g)),
        ("8 channels 60 times larger", (outliers, w, g)),
        ("a massive token", (massive, w, g)),
        ("weights log-normal over rows", (x, w * torch.exp(normal(outputs, 1)), g)),
    ):
        yield what, cast(Products, tuple(t.to(torch.bfloat16) for t in found))


def exact(x: Tensor, w: Tensor, g: Tensor) -> Products:
    x, w, g = x.double(), w.double(), g.double()
    return x @ w.t(), g @ w, g.t() @ x


def ours(name: str) -> Callable[[Tensor, Tensor, Tensor], Products]:
    def products(x: Tensor, w: Tensor, g: Tensor) -> Products:
        x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = linear_in_8_bits(x, w, None, RECIPES[name], of=x, keeps_codes=True)
        of_x, of_w = torch.autograd.grad(y, (x, w), g)
        return y.detach(), of_x, of_w

    return products


def torchao(name: str) -> Callable[[Tensor, Tensor, Tensor], Products]:
    """torchao's own layer, in the emulation that it has for devices without such products."""
    config = import_module("torchao.float8").Float8LinearConfig.from_recipe_name(name)
    config, layer_of = dataclasses.replace(config, emulate=True), import_module("torchao.float8.float8_linear")

    def products(x: Tensor, w: Tensor, g: Tensor) -> Products:
        linear = nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype)
        linear.weight.data.copy_(w)
        layer = layer_of.Float8Linear.from_float(linear, config)
        x = x.clone().requires_grad_()
        y = layer(x)
        of_x, of_w = torch.autograd.grad(y, (x, layer.weight), g)
        return y.detach(), of_x, of_w

    return products


WAYS: dict[str, Callable[[], Callable[[Tensor, Tensor, Tensor], Products]]] = {
    "torchao rowwise": lambda: torchao("rowwise"),
    "`fp8_row`": lambda: ours("fp8_row"),
    "torchao tensorwise": lambda: torchao("tensorwise"),
    "`fp8_tensor`": lambda: ours("fp8_tensor"),
    "`int8_row`": lambda: ours("int8_row"),
}


def error_rows(smoke: bool, old: Rows) -> Iterator[Row]:
    """Relative Frobenius errors of y, dX and dW, and of the worst input channel of dW."""
    sizes = (64, 32, 32) if smoke else (TOKENS, INPUTS, OUTPUTS)
    for what, (x, w, g) in inputs(*sizes):
        want = exact(x, w, g)
        for way, make in WAYS.items():
            got = make()(x, w, g)
            found = {
                name: ((a.double() - b).norm() / b.norm()).item()
                for name, a, b in zip(("y", "dx", "dw"), got, want, strict=True)
            }
            columns = (got[2].double() - want[2]).norm(dim=0) / want[2].norm(dim=0)
            yield {"case": what, "way": way, **found, "dw_channel": columns.max().item(), "sizes": list(sizes)}
