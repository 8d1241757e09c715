"""Keys and values of one layer, as the cache that the layer believes to fill.

transformers' attention hands its keys and values to a cache and goes on with what the cache returns. So a cache is the
place to put a chunk's keys behind those of the chunks before it, whatever the rest of the layer is. `Keys` has room for
all tokens at once, returns views and never joins tensors. It serves three passes:

    first   forward: keys and values are written and read
    fill    backward, before all else: all but the last chunk's are written again, and the layer is left by an exception
            as soon as they are
    again   backward, a chunk at a time, the last one first: a node of autograd stands where the cache is. Its backward
            gets the gradients of all keys that the chunk has seen, adds them up in fp32, and hands on the sum of the
            chunk's own: it is complete, because later chunks came first

That node makes one backward pass a chunk do, without keeping the graph for a second one from keys to the input.
"""

from typing import NoReturn, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_lowmem.activations.streaming.attention import Corner

__all__ = ["Filled", "Keys"]


class Filled(Exception):
    """A chunk's keys and values are written: no more of the layer is needed."""


class Keys:
    """A cache for one layer and one pass over the chunks; `at` says which chunk comes.

    Args:
        tokens: of all chunks.
        what: the layer, in words.
        one: whether there is one chunk only, whose keys need no place beside them.
        longest: tokens of the longest chunk.
    """

    is_compileable = False
    is_initialized = True

    def __init__(self, tokens: int, what: str, one: bool, longest: int) -> None:
        self.tokens, self.what, self.one = tokens, what, one
        self.corner = Corner(tokens, longest)
        self.start = self.end = self.first = self.calls = 0
        self.way = "first"
        self.kept: list[Tensor] = []  # keys and values, each (rows, heads, tokens, dimension)
        self.grads: list[Tensor | None] = [None, None]  # fp32 sums, of the same shape

    def at(self, start: int, end: int, first: int, way: str) -> "Keys":
        """The chunk [start, end) comes, which sees the keys from `first` on."""
        self.start, self.end, self.first, self.way, self.calls = start, end, first, way, 0
        return self

    def get_seq_length(self, *args: object, **kwargs: object) -> int:
        return self.start

    def update(self, key: Tensor, value: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Write a chunk's keys and values; returns all that it may see."""
        self.calls += 1
        pair = (key, value)
        if self.calls > 1 or any(t.ndim != 4 or t.shape[-2] != self.end - self.start for t in pair):
            shapes = " and ".join(str(tuple(t.shape)) for t in pair)
            raise ValueError(
                f"{self.what} is streamed and has handed its cache keys and values of shapes {shapes}, in call "
                f"{self.calls} for a chunk of {self.end - self.start} tokens: only one attention a layer, over (rows, "
                "heads, tokens, dimension), can be cut into chunks. Use lowmem_activations='checkpoint_fp8' for it."
            )
        if self.one:
            return pair
        if not self.kept:
            self.kept = [t.new_empty((*t.shape[:2], self.tokens, t.shape[3])) for t in pair]
        if self.way == "again":
            return cast("tuple[Tensor, Tensor]", _Seen.apply(self, key, value))
        self.write(key, value)
        if self.way == "fill":
            raise Filled
        return self.views()

    @torch.no_grad()
    def write(self, key: Tensor, value: Tensor) -> None:
        for kept, t in zip(self.kept, (key, value), strict=True):
            kept[:, :, self.start : self.end] = t

    def views(self) -> tuple[Tensor, Tensor]:
        key, value = (kept[:, :, self.first : self.end] for kept in self.kept)
        return key, value

    def add(self, which: int, grad: Tensor | None, first: int, start: int, end: int) -> Tensor | None:
        """Add the gradient of keys [first, end); returns the sum so far of [start, end)."""
        total = self.grads[which]
        if grad is not None:
            if total is None:
                wide = torch.promote_types(grad.dtype, torch.float32)
                total = self.grads[which] = torch.zeros_like(self.kept[which], dtype=wide)
            total[:, :, first:end] += grad
        return None if total is None else total[:, :, start:end].to(self.kept[which].dtype)

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"{self.what} is streamed and asks its cache for {name!r}, which chunks of tokens have not. Use "
            "lowmem_activations='checkpoint_fp8' for it."
        )


class Context(Protocol):
    """Place of what a chunk's keys leave for their backward."""

    keys: Keys
    place: tuple[int, int, int]

    def set_materialize_grads(self, value: bool) -> None: ...


class _Seen(torch.autograd.Function):
    """A chunk's keys and values → views of all that it sees."""

    @staticmethod
    def forward(ctx: Context, keys: Keys, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.keys, ctx.place = keys, (keys.first, keys.start, keys.end)
        if keys.end == keys.tokens:  # no chunk sees those of the last but itself
            keys.write(key, value)
        return keys.views()

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *(ctx.keys.add(which, grad, *ctx.place) for which, grad in enumerate(grads))
