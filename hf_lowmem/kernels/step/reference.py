"""Common part of the fused steps, in torch: which gradients are finite, states and weights read and written."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lowmem.kernels.codecs.reference import CODECS, decode_state, encode_state
from hf_lowmem.kernels.codecs.weights import join_24, round_stochastic, split_24

# Squares and sums of a gradient below this stay inside fp32. Anything above is a diverged step, as Inf and NaN are.
LARGEST_GRADIENT = 1e15


def is_finite_gradient(grad: Tensor) -> Tensor:
    """Whether every value of an fp32 gradient is finite and below 1e15 in magnitude: a bool on its device.

    One pass, where a norm would take eight times as long on a CPU.
    """
    low, high = torch.aminmax(grad)
    return (low > -LARGEST_GRADIENT) & (high < LARGEST_GRADIENT)  # False for NaN too


def load_weight(p: Tensor, correction: Tensor | None) -> Tensor:
    """A weight in fp32: `p` itself where it is."""
    if correction is not None:
        return join_24(p, correction)
    return p if p.dtype == torch.float32 else p.to(torch.float32)


def save_weight(p: Tensor, weights: Tensor, correction: Tensor | None, seed: int | None, first: int = 0) -> None:
    """Write what `load_weight` gave and a step has changed; with a seed, rounded at random.

    `first`: place of the first value in the whole parameter, of which `p` may be a part or a shard.
    """
    if correction is not None:
        coarse, fine = split_24(weights, seed, first)
        p.copy_(coarse)
        correction.copy_(fine)
    elif seed is not None:
        p.copy_(round_stochastic(weights, seed, first))
    elif weights is not p:
        p.copy_(weights)


class States:
    """One state of several parameters, encoded: its tensors in one list, parameter after parameter.

    Encoded at random, by the seeds of the parameters.
    """

    def __init__(self, codec: str, parts: Sequence[Tensor], signed: bool, seeds: Sequence[int]) -> None:
        self.codec = codec
        self.parts = parts
        self.signed = signed
        self.seeds = seeds
        self.each = 1 if codec == "fp32" else 1 + len(CODECS[codec].scalars[signed])

    def of(self, i: int) -> Sequence[Tensor]:
        return self.parts[i * self.each : (i + 1) * self.each]

    def load(self, i: int) -> Tensor:
        """The i-th parameter's state in fp32: with codec "fp32" the tensor itself."""
        codes, *scalars = self.of(i)
        return codes if self.codec == "fp32" else decode_state(codes, scalars, self.codec, self.signed)

    def save(self, i: int, value: Tensor, first: int = 0) -> None:
        codes, *scalars = self.of(i)
        if value is not codes:
            encode_state(value, codes, scalars, self.codec, self.signed, self.seeds[i], first)


def each_finite(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    skipped: Tensor,
    corrections: Sequence[Tensor],
    store: str,
    seeds: Sequence[int],
    first: int = 0,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(index, weight, gradient), both fp32, of each parameter whose gradient is finite; what is done to the weight
    between two of them is written back. Bad gradients are counted in `skipped`. `first`: as in `save_weight`."""
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        grad = g.to(torch.float32)
        if not p.numel():
            continue
        if not is_finite_gradient(grad):
            skipped.add_(1)
        else:
            correction = corrections[i] if store == "bf16_ecc" else None
            weights = load_weight(p, correction)
            yield i, weights, grad
            save_weight(p, weights, correction, seeds[i] if store != "keep" else None, first)


def on_the_cpu(step: Callable[..., None]) -> Callable[..., None]:
    """A reference whose arguments on another device are computed on copies of them on the CPU.

    Torch's fused operators are not the same function everywhere (a GPU's `addcdiv` divides first, and its division by
    a number multiplies by the inverse); those of the CPU are the ones that Triton's kernels compute.
    """

    @functools.wraps(step)
    def run(*args: Any) -> None:
        here = [
            [t.cpu() if isinstance(t, Tensor) else t for t in (a if isinstance(a, list | tuple) else [a])] for a in args
        ]
        step(*(new if isinstance(old, list | tuple) else new[0] for old, new in zip(args, here, strict=True)))
        for there, result in zip(args, here, strict=True):
            for old, new in zip(there if isinstance(there, list | tuple) else [there], result, strict=True):
                if isinstance(old, Tensor) and old.device.type != "cpu":
                    old.copy_(new)

    return run
