"""Parameters, gradients and runs of the tests of fused steps."""

from typing import Any

import torch
from torch import Tensor, nn

from hf_lowmem.kernels import use_kernels
from hf_lowmem.optim import OPTIMIZERS, LowMemOptimizer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CODECS = ("fp32", "int8", "fp8_expand", "int8_softsign,fp8_expand")
STORES = ("keep", "bf16_sr", "bf16_ecc")
# The first two are compressed, with a ragged last block; the rest keeps fp32 states.
SHAPES = ((23, 25), (515,), (5, 9), (), (0, 4))
BAD_STEP = 1
SETTINGS: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).to(dtype).to(DEVICE) for shape in SHAPES]
    tensors.append(torch.randn(22, 25, generator=generator).to(dtype).to(DEVICE).T)
    tensors.append(torch.randn(13, 80, generator=generator).to(dtype).to(DEVICE)[:, ::2])
    return [nn.Parameter(t) for t in tensors]


def set_gradients(params: list[nn.Parameter], step: int, dtype: torch.dtype | None = None) -> None:
    """In `BAD_STEP` two of them are bad: a nan in the first, something too large in the third."""
    generator = torch.Generator().manual_seed(100 + step)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator) * 0.1
        if step == BAD_STEP and i in (0, 2):
            grad.view(-1)[-1] = float("nan") if i == 0 else -2e15
        if dtype not in (None, p.dtype):
            p.grad_dtype = None  # any
        p.grad = torch.empty_like(p, dtype=dtype or p.dtype).copy_(grad)  # strided as p is


def make(name: str, params: list[nn.Parameter], **settings: Any) -> LowMemOptimizer:
    names = [f"p{i}" for i in range(len(params))]
    return OPTIMIZERS[name](list(zip(names, params, strict=True)), **SETTINGS | settings)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    return a == b


def assert_same(one: LowMemOptimizer, other: LowMemOptimizer) -> None:
    for p, q in zip(one.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q), f"weights of {tuple(p.shape)}"
        for key, value in one.state[p].items():
            assert same(value, other.state[q][key]), f"{key} of {tuple(p.shape)}"
    assert one.skipped() == other.skipped()


def run(
    name: str,
    impl: str,
    steps: range,
    dtype: torch.dtype,
    params: list[nn.Parameter],
    optimizer: LowMemOptimizer | None = None,
    *,
    grad_dtype: torch.dtype | None = None,
    **settings: Any,
) -> LowMemOptimizer:
    optimizer = optimizer or make(name, params, **settings)
    with use_kernels(impl):
        for step in steps:
            set_gradients(params, step, grad_dtype)
            optimizer.step()
    return optimizer
