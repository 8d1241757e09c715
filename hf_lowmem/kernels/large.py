"""Arguments at the sizes of an 8B model: what a kernel's speed is measured on.

Speed is bytes that must move over time, beside the same of a copy: each tensor is read once, each result written once,
and what is changed in place both.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hf_lowmem.kernels.codecs.cases import room
from hf_lowmem.kernels.codecs.reference import encode_state
from hf_lowmem.kernels.compare import written
from hf_lowmem.kernels.operands.reference import code_rows
from hf_lowmem.kernels.quantize.reference import quantize
from hf_lowmem.kernels.registry import Kernel
from hf_lowmem.kernels.step.cases import skips_of

__all__ = ["FFN", "HIDDEN", "TOKENS", "bytes_moved", "large"]

BF16 = torch.bfloat16
HIDDEN, FFN, TOKENS = 4096, 14336, 8192
Make = Callable[[torch.device], tuple[Any, ...]]


def large(tokens: int, hidden: int, ffn: int) -> dict[tuple[str, str], Make]:
    """(kernel, what) → its arguments on a device. Each kernel's first is what most runs have it do."""
    return _of_activations(tokens, hidden, ffn) | _of_states(hidden, ffn) | _of_steps(hidden, ffn)


def bytes_moved(kernel: Kernel, args: tuple[Any, ...], results: Any) -> int:
    """Every tensor once, and once more where it is changed in place. `encode_state` only writes what it changes."""
    again = [] if kernel.name == "encode_state" else written(kernel, args)
    return sum(t.nbytes for t in tree_leaves((args, results, again)) if isinstance(t, Tensor))


def _draw(device: torch.device, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, device=device, generator=generator, dtype=torch.float32).to(dtype)


def _codes(device: torch.device, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    bits = torch.randint(0, 126, shape, device=device, generator=generator, dtype=torch.uint8)
    return bits, torch.full((*shape[:-1], -(-shape[-1] // 128)), 0.01, dtype=BF16, device=device)


def _of_activations(tokens: int, hidden: int, ffn: int) -> dict[tuple[str, str], Make]:
    def unit(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (gate, scales), (up, more) = _codes(device, tokens, ffn), _codes(device, tokens, ffn)
        return gate, up, scales, more

    def norm(d: torch.device) -> tuple[Any, ...]:
        return _draw(d, tokens, hidden), *_codes(d, tokens, hidden), _draw(d, hidden), None, 1e-5, False, BF16, True

    def factor(d: torch.device, length: int) -> Tensor:
        return torch.full((length,), 0.01, device=d)

    def operands(d: torch.device, fmt: str) -> tuple[object, ...]:
        x, w = (code_rows(_draw(d, rows, hidden), None, None, fmt, "rows") for rows in (max(tokens, 32), ffn))
        return x[0], w[0], x[2], w[2], True, BF16

    return {
        ("code_rows", "e4m3"): lambda d: (_draw(d, tokens, hidden), None, None, "e4m3", "rows"),
        ("code_rows", "e4m3, turned"): lambda d: (_draw(d, tokens, hidden), None, None, "e4m3", "turned"),
        ("code_rows", "e4m3, folded"): lambda d: (_draw(d, tokens, ffn), factor(d, ffn), None, "e4m3", "rows"),
        ("code_columns", "e4m3, folded"): lambda d: (_draw(d, tokens, ffn), factor(d, tokens), "e4m3"),
        ("product_of_codes", "e4m3"): lambda d: operands(d, "e4m3"),
        ("product_of_codes", "int8"): lambda d: operands(d, "int8"),
        ("quantize", "e4m3"): lambda d: (_draw(d, tokens, hidden), "e4m3", None),
        ("quantize", "int8"): lambda d: (_draw(d, tokens, hidden), "int8", None),
        ("dequantize", "e4m3"): lambda d: (*_codes(d, tokens, hidden), "e4m3", BF16),
        ("dequantize", "int8"): lambda d: (*quantize(_draw(d, tokens, hidden), "int8", None), "int8", BF16),
        ("rmsnorm", "bf16"): lambda d: (_draw(d, tokens, hidden), _draw(d, hidden), None, 1e-5, False, True, None),
        ("rmsnorm_again", "bf16"): lambda d: (*_codes(d, tokens, hidden), _draw(d, hidden), 1e-5, False, True, BF16),
        ("rmsnorm_backward", "bf16"): norm,
        ("glu_save", "silu"): lambda d: (_draw(d, tokens, ffn), _draw(d, tokens, ffn), "silu", None, None),
        ("glu", "silu, from codes"): lambda d: (*unit(d), "silu", BF16),
        ("glu_backward", "silu, from codes"): lambda d: (_draw(d, tokens, ffn), *unit(d), "silu", BF16),
    }


def _state(device: torch.device, shape: tuple[int, ...], codec: str, signed: bool) -> tuple[Any, ...]:
    """A state's values, room for its codes and scalars, and what encodes the one into the other."""
    x = _draw(device, *shape, dtype=torch.float32)
    return (x if signed else x.square(), *room(codec, x.shape, signed, device), codec, signed, 1, 0)


def _encoded(device: torch.device, shape: tuple[int, ...], codec: str, signed: bool) -> tuple[Tensor, list[Tensor]]:
    x, codes, scalars, *_ = _state(device, shape, codec, signed)
    encode_state(x, codes, scalars, codec, signed, None, 0)
    return codes, scalars


def _of_states(hidden: int, ffn: int) -> dict[tuple[str, str], Make]:
    found: dict[tuple[str, str], Make] = {}
    shape = (ffn, hidden)
    for codec, signed in (("int8", True), ("int8_softsign", True), ("fp8_expand", True), ("fp8_expand", False)):
        kind = f"{codec}, {'signed' if signed else 'unsigned'}"
        found["encode_state", kind] = lambda d, c=codec, s=signed: _state(d, shape, c, s)
        found["decode_state", kind] = lambda d, c=codec, s=signed: (*_encoded(d, shape, c, s), c, s)
    return found


def _of_steps(hidden: int, ffn: int) -> dict[tuple[str, str], Make]:
    """Arguments of the step kernels: one bf16 weight, rounded at random; APOLLO's with a factor a channel, rank 256."""
    shape = (ffn, hidden)
    pair = ("int8_softsign", "fp8_expand")

    def flat(device: torch.device, codec: str, signed: bool) -> list[Tensor]:
        codes, scalars = _encoded(device, shape, codec, signed)
        return [codes, *scalars]

    def adamw(d: torch.device) -> tuple[Any, ...]:
        moments = (flat(d, codec, signed) for codec, signed in zip(pair, (True, False), strict=True))
        numbers = [3], "adamw", 1e-4, 0.9, 0.999, 1e-8, 0.1, 0
        return [_draw(d, *shape)], [_draw(d, *shape)], skips_of(d), [], *moments, *pair, "bf16_sr", [5], [6], *numbers

    def lion(d: torch.device) -> tuple[Any, ...]:
        momentum = flat(d, pair[0], True)
        weight = [_draw(d, *shape)], [_draw(d, *shape)], skips_of(d), []
        return *weight, momentum, pair[0], "bf16_sr", [5], [6], 1e-4, 0.9, 0.99, 0.1, 0

    def projections(d: torch.device) -> tuple[Tensor, ...]:
        return tuple(_draw(d, 1, ffn, min(256, hidden), dtype=torch.float32) for _ in range(2))

    def moments(d: torch.device) -> tuple[object, ...]:
        codes = (_encoded(d, (ffn, min(256, hidden)), c, s) for c, s in zip(pair, (True, False), strict=True))
        return projections(d)[0], _flag(d), *([one, *scalars] for one, scalars in codes), *pair

    def factors(d: torch.device) -> tuple[Any, ...]:
        return [_draw(d, *shape)], *projections(d), _flag(d), [torch.zeros((), device=d)], True, 1.0

    def apollo(d: torch.device) -> tuple[Any, ...]:
        found = _draw(d, 1, ffn, 1, dtype=torch.float32), torch.ones(1, device=d), torch.ones(1, device=d)
        weight = [_draw(d, *shape)], [_draw(d, *shape)], [], _flag(d), skips_of(d), [torch.zeros((), device=d)]
        return *weight, *found, [5], [3], 1.0, 1e-4, 0.9, 0.999, 0.1

    return {
        ("adamw_step", "8bit, bf16_sr"): adamw,
        ("lion_step", "8bit, bf16_sr"): lion,
        ("adam_direction", "8bit, rank 256"): lambda d: (*moments(d), 0.9, 0.999, 1e-6),
        ("adam_moments", "8bit, rank 256"): lambda d: (*moments(d), [6], 0.9, 0.999),
        ("apollo_factors", "channels"): factors,
        ("apollo_step", "channels, bf16_sr"): apollo,
    }


def _flag(device: torch.device) -> Tensor:
    return torch.ones(1, dtype=torch.int32, device=device)
