"""A call of a streamed layer: its chunks, and the passes over them.

What is drawn, cast and switched in the forward pass is noted, so that backward runs the same computation again.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from hf_lowmem.activations.checkpoint import CACHES, Args, Kwargs
from hf_lowmem.activations.draws import Draws
from hf_lowmem.activations.formats import decompress
from hf_lowmem.activations.fusable import is_fake
from hf_lowmem.activations.state import State
from hf_lowmem.activations.streaming import attention
from hf_lowmem.activations.streaming.attention import Chunk, lower_right, streaming
from hf_lowmem.activations.streaming.documents import Documents
from hf_lowmem.activations.streaming.keys import Filled, Keys
from hf_lowmem.activations.streaming.masks import Causal, Lazy, mask_of
from hf_lowmem.activations.streaming.shared import Shared
from hf_lowmem.activations.streaming.weights import standing_in, trained
from hf_lowmem.patching import version_of

__all__ = ["Call", "cache_name"]

PLANNED = 3  # of the chunks of a planned step, the last that are run
# Arguments whose last dimension counts tokens, and those that count documents.
POSITIONS = ("position_ids", "cache_position")
DOCUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k")


def cache_name(layer: nn.Module) -> str | None:
    """The name of the argument by which a layer takes a cache: `cache`, before transformers 5.24 another."""
    names = inspect.signature(type(layer).forward).parameters
    return next((name for name in CACHES if name in names), None)


class Call:
    """One call of a streamed layer: all that its passes share.

    Args:
        module: the layer.
        original: its forward.
        fmt: how its input is kept.
        implementation: of attention.
        hidden, kwargs: of the call.
        chunk: tokens.
        seed: of stochastic rounding of its input; None rounds to the nearest.
        hands_mask: whether the layer is known to ask transformers' table for its attention with the mask that it is
            given. Else the first chunk is given one in any case, which shows it.

    tail: what the layer returns beside the activations; None where it returns a tensor.
    """

    def __init__(
        self,
        module: nn.Module,
        original: Callable[..., object],
        fmt: str,
        implementation: str,
        hidden: Tensor,
        kwargs: Kwargs,
        chunk: int,
        seed: int | None = None,
        hands_mask: bool = False,
    ) -> None:
        self.module, self.original, self.fmt, self.seed = module, original, fmt, seed
        self.what, self.implementation = type(module).__name__, implementation
        self.shape, self.dtype, self.device = hidden.shape, hidden.dtype, hidden.device
        tokens = hidden.shape[1]
        self.cache = cache_name(module) or "cache"
        # A cache by another name would be filled, too.
        self.kwargs = {name: value for name, value in kwargs.items() if name not in CACHES}
        self.mask = mask_of(self.kwargs.pop("attention_mask", None), implementation, self.what)
        spans = [(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk)]
        self.spans = [(*span, first) for span, first in zip(spans, self.mask.starts(spans), strict=True)]
        if is_fake():  # memory grows from chunk to chunk: the last ones have the peak, and the third sums that wait
            self.spans = [*self.spans[:1], *self.spans[1:][-PLANNED:]]
        self.draws: list[Draws | None] = []
        self.state = State(module)
        self.autocast = _autocast_now(hidden.device.type)
        self.documents: Documents | Shared | None = None
        half = torch.is_autocast_enabled(hidden.device.type) or attention.halves(hidden.dtype)
        fast = attention.on_accelerator(hidden)
        if isinstance(self.mask, Lazy) and implementation == "sdpa" and (half or not fast):
            self.documents = self.mask.shared() or (self.mask.documents() if fast else None)
        self.tail: Args | None = None
        self.hands_mask = hands_mask or is_fake()
        self.asks_table = True  # until a chunk shows that it does not

    def keys(self) -> Keys:
        longest = max(end - start for start, end, _ in self.spans)
        return Keys(self.shape[1], self.what, one=len(self.spans) == 1, longest=longest)

    def first(self, hidden: Tensor) -> Tensor:
        """The forward pass."""
        version = version_of(hidden)
        out = self.through(lambda start, end: hidden[:, start:end], again=False)
        if self.state.written() or version_of(hidden) != version:
            raise RuntimeError(
                f"{self.what} is streamed and writes to its input or to a buffer while it runs, which its chunks would "
                "do one after another. Use lowmem_activations='checkpoint_fp8'."
            )
        return out

    @torch.no_grad()
    def repeated(self, cut: Callable[[int, int], Tensor], into: Tensor | None) -> Tensor:
        """The forward pass once more, without a graph.

        Args:
            cut: the part of the input from one token to another.
            into: a tensor for the output, which may be the one that the input is cut from; None for a new one.
        """
        with self.state.again(), self.autocast():
            return self.through(cut, again=True, into=into)

    def through(self, cut: Callable[[int, int], Tensor], again: bool, into: Tensor | None = None) -> Tensor:
        """Run all chunks, the first one first. Draws of random numbers are noted, or drawn `again`."""
        keys, whole_out = self.keys(), into
        torch.clear_autocast_cache()
        for index, (start, end, first) in enumerate(self.spans):
            draws = None if again else Draws(self.device)
            with self.drawn(index) if again else contextlib.nullcontext():
                out = self.run(cut(start, end), keys.at(start, end, first, "first"))
            if draws is not None:
                self.draws.append(draws if draws.settle() else None)
            if len(self.spans) == 1:
                whole_out = out
            else:
                if whole_out is None:
                    whole_out = out.new_empty((out.shape[0], self.shape[1], *out.shape[2:]))
                whole_out[:, start:end] = out
            del out
        # Casts that were made without a graph must not be met by somebody who needs one.
        torch.clear_autocast_cache()
        assert whole_out is not None
        return whole_out

    def drawn(self, index: int) -> contextlib.AbstractContextManager[None]:
        """A context in which a chunk draws what it drew in the forward pass."""
        draws = self.draws[index]
        return contextlib.nullcontext() if draws is None else draws.again()

    def run(self, x: Tensor, keys: Keys) -> Tensor:
        """The layer on one chunk."""
        start, end, first = keys.start, keys.end, keys.first
        causal = isinstance(self.mask, Causal)
        given = {name: self.cut(name, value, start, end) for name, value in self.kwargs.items()}
        made = partial(self.mask.block, start, end, first)
        unmasked = self.documents is not None and self.asks_table and (start > 0 or self.hands_mask)
        mask = None if unmasked else made()
        if causal and start > 0 and not self.asks_table:
            mask = lower_right(end - start, end - first, self.device)
        if mask is not None or "attention_mask" in inspect.signature(self.original).parameters:
            given["attention_mask"] = mask
        chunk = Chunk(causal, keys.corner, start, first, mask, made, self.documents)
        with streaming(chunk, self.implementation):
            out = self.original(x, **{**given, self.cache: keys, "use_cache": False})
        if keys.calls != 1:
            raise ValueError(
                f"{self.what} is streamed and has not handed its keys and values to the cache that it was given, so a "
                "chunk would not see those before it. Use lowmem_activations='checkpoint_fp8' for it."
            )
        self.asks_table &= chunk.attended == 1
        if unmasked and not (self.asks_table or is_fake()):
            raise RuntimeError(
                f"{self.what} is streamed and has not asked transformers' table for its attention as it did before, so "
                "a chunk would see what its mask hides. Use lowmem_activations='checkpoint_fp8' for it."
            )
        return self.taken(out)

    def taken(self, out: object) -> Tensor:
        """The activations that a layer returns."""
        if isinstance(out, tuple) and out and all(rest is None for rest in out[1:]):
            out, self.tail = out[0], out[1:]
        if not isinstance(out, Tensor):
            raise ValueError(
                f"{self.what} is streamed and returns {type(out).__name__}: expected activations, alone or first of a "
                "tuple of nothing else. Use lowmem_activations='checkpoint_fp8'."
            )
        return out

    def cut(self, name: str, value: object, start: int, end: int) -> object:
        """An argument's part for the tokens [start, end)."""
        tokens = self.shape[1]
        if isinstance(value, tuple | list):
            return type(value)(self.cut(name, item, start, end) for item in value)
        if not isinstance(value, Tensor) or name in DOCUMENTS or tokens not in value.shape:
            return value
        if name in POSITIONS and value.shape[-1] == tokens:
            return value[..., start:end]
        if name.startswith("position_embeddings"):
            return value[..., start:end, :] if value.shape[-2] == tokens else value
        if value.ndim > 1 and value.shape[:2] == self.shape[:2]:
            return value[:, start:end]
        raise ValueError(
            f"{self.what} is streamed and was given {name} of shape {tuple(value.shape)}, of which it is not known "
            "where its tokens are. Use lowmem_activations='checkpoint_fp8' for it."
        )

    def decoded(self, parts: Sequence[Tensor], start: int, end: int) -> Tensor:
        if self.fmt == "none":
            return parts[0][:, start:end].detach()
        cut = [part[:, start:end].contiguous() for part in parts]
        return decompress(cut, self.fmt, (self.shape[0], end - start, self.shape[2]), self.dtype)

    def second(self, parts: Sequence[Tensor], grad: Tensor, wants: bool) -> tuple[Tensor | None, ...]:
        """The backward pass: gradients of the input and of the weights."""
        weights = trained(self.module)
        leaves = [p.detach().requires_grad_() for p in weights]
        with self.state.again(), self.autocast(), standing_in(self.module, weights, leaves):
            keys = self.keys()
            self.fill(parts, keys)
            of_weights: list[Tensor | None] = [None] * len(weights)
            of_hidden = grad.new_empty(self.shape, dtype=self.dtype) if wants and len(self.spans) > 1 else None
            for index, (start, end, first) in reversed(list(enumerate(self.spans))):
                x = self.decoded(parts, start, end).requires_grad_(wants)
                with torch.enable_grad(), self.drawn(index):
                    out = self.run(x, keys.at(start, end, first, "again"))
                inputs = [x, *leaves] if wants else leaves
                found: list[Tensor | None] = list(
                    torch.autograd.grad([out], inputs, [grad[:, start:end]], allow_unused=True)
                )
                del out, x
                if len(self.spans) == 1:
                    return tuple(found if wants else (None, *found))
                if wants and of_hidden is not None:
                    of_chunk = found.pop(0)
                    of_hidden[:, start:end] = 0 if of_chunk is None else of_chunk
                    del of_chunk
                _add_up(of_weights, found)
            torch.clear_autocast_cache()
            for i, p in enumerate(weights):
                total = of_weights[i]
                of_weights[i] = None if total is None else total.to(p.dtype)
            return of_hidden, *of_weights

    def fill(self, parts: Sequence[Tensor], keys: Keys) -> None:
        """Compute the keys and values of all chunks but the last, which comes first and brings its own."""
        with torch.no_grad():
            for index, (start, end, first) in enumerate(self.spans[:-1]):
                x = self.decoded(parts, start, end)
                with contextlib.suppress(Filled), self.drawn(index):
                    self.run(x, keys.at(start, end, first, "fill"))
        torch.clear_autocast_cache()


def _add_up(totals: list[Tensor | None], found: list[Tensor | None]) -> None:
    """Add gradients of one chunk to the sums of the others, in fp32 or more. Empties `found`."""
    for i in reversed(range(len(totals))):
        grad, total = found.pop(), totals[i]
        if grad is None:
            continue
        if total is None:
            totals[i] = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
        else:
            total += grad


def _autocast_now(device: str) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A context that casts as code that runs now does."""
    kinds = [kind for kind in dict.fromkeys((device, "cpu")) if torch.amp.is_autocast_available(kind)]
    settings = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
    cache = torch.is_autocast_cache_enabled()

    @contextlib.contextmanager
    def casting() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in settings:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cache))
            yield

    return casting
