"""Tiers `stream` and `stream_fp8`: a layer runs on chunks of tokens, forward and backward, so that of the inside of a
layer no more than one chunk is ever there.

Checkpointing keeps a layer's input and runs the whole layer again: of a long sequence, what a single layer has inside
is then the peak. A decoder layer treats each token by itself, but for attention, which looks back. So it can run chunk
after chunk over growing keys and values (`Keys`), and its backward pass chunk before chunk, the last one first:

    forward   for each chunk: run, without a graph; keys and values grow. The input is kept (`stream_fp8`: in E4M3)
    backward  1. for each chunk: run until keys and values are written
              2. for each chunk from the last: run with a graph; one backward pass through it gives the gradients of
                 the chunk's input, of the weights (added up in fp32), and of all keys and values before it

All of this is one node of autograd, whose inputs are the activations *and the layer's weights*. A backward pass of a
chunk that wrote into `.grad` itself would do so once a chunk: a hook that steps a weight would step it on a part of its
gradient, DDP would reduce a part, and sums would be rounded to bf16 each time. As inputs of the node weights get their
gradient once and whole, and neither DDP nor FSDP2 need to know.

It is exact: nothing is left out, and a chunk's sums are those of the whole but for their order. Random numbers are
drawn chunk by chunk, and drawn again in backward from the same states.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hf_lowmem.activations.checkpoint import CACHES, Args, Kwargs, RunsAgain
from hf_lowmem.activations.detect import is_linear
from hf_lowmem.activations.draws import Draws
from hf_lowmem.activations.formats import compress, decompress
from hf_lowmem.activations.fusable import is_fake
from hf_lowmem.activations.host import HostStore, Kept
from hf_lowmem.activations.state import State
from hf_lowmem.activations.streaming import attention
from hf_lowmem.activations.streaming.attention import Chunk, lower_right, streaming
from hf_lowmem.activations.streaming.keys import Filled, Keys
from hf_lowmem.activations.streaming.masks import Causal, mask_of, whole
from hf_lowmem.activations.streaming.trial import TOKENS, check_by_trial
from hf_lowmem.activations.streaming.weights import standing_in, trained
from hf_lowmem.patching import version_of

__all__ = ["Streamed", "cache_name", "chunk_of", "wrap_streamed"]

ROOM = 2**30  # bytes that a chunk's graph may take
MASK_ROOM = 2**28  # and its mask, where attention needs one
STEP = 256  # tokens; a chunk is a multiple of it
PLANNED = 3  # of the chunks of a planned step, the last that are run
# Arguments whose last dimension counts tokens, and those that count documents.
POSITIONS = ("position_ids", "cache_position")
DOCUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k")


def chunk_of(hidden: Tensor, widest: int) -> int:
    """Tokens of a chunk: as many as a graph in ROOM holds, of about 23 tensors of the hidden size and 5 of the widest
    linear one (counted on Llama), and attention's mask in MASK_ROOM where it needs one."""
    rows, tokens, width = hidden.shape
    chunk = ROOM // (rows * (23 * width + 5 * widest) * hidden.element_size())
    if not attention.on_accelerator(hidden):
        chunk = min(chunk, MASK_ROOM // (rows * tokens * hidden.element_size()))
    return max(STEP, chunk // STEP * STEP)


def cache_name(layer: nn.Module) -> str | None:
    """The name of the argument by which a layer takes a cache: `cache`, before transformers 5.24 another."""
    names = inspect.signature(type(layer).forward).parameters
    return next((name for name in CACHES if name in names), None)


def wrap_streamed(
    layer: nn.Module,
    tier: str,
    fmt: str,
    chunk: int | None,
    implementation: str,
    seeds: Callable[[], int] | None,
    store: HostStore | None = None,
) -> None:
    """Let `layer` run by chunks.

    Args:
        layer: a decoder layer that `why_not_streamed` has nothing against.
        tier: its name in reports and errors.
        fmt: how its input is kept, of `FORMATS`.
        chunk: tokens; None for `chunk_of`.
        implementation: of attention: "sdpa" or "eager".
        seeds: called once a forward pass for the seed of stochastic rounding; None rounds to the nearest.
        store: where its input is kept; None: on its device.
    """
    Streamed(layer, tier, fmt, chunk, implementation, seeds, store).install()


class Streamed(RunsAgain):
    """A layer's forward by chunks."""

    def __init__(
        self,
        module: nn.Module,
        tier: str,
        fmt: str,
        chunk: int | None,
        implementation: str,
        seeds: Callable[[], int] | None,
        store: HostStore | None,
    ) -> None:
        self.tier = tier
        super().__init__(module, fmt, seeds, store)
        self.chunk, self.implementation, self.tried = chunk, implementation, False
        linears = [m for m in module.modules() if is_linear(m)]
        self.widest = max((int(getattr(m, "out_features", None) or getattr(m, "nf", 0)) for m in linears), default=0)

    @torch.compiler.disable(reason="streamed layers are run by eager code")
    def __call__(self, *args: object, **kwargs: object) -> object:
        if self.training():
            return self.forward(*args, **kwargs)
        return self.original(*map(whole, args), **{name: whole(value) for name, value in kwargs.items()})

    def forward(self, *args: object, **kwargs: object) -> object:
        hidden, args, kwargs = self.hidden_of(args, kwargs)
        kwargs = self.by_name(args) | kwargs
        what = type(self.module).__name__
        if hidden.ndim != 3:
            raise ValueError(
                f"{what} is streamed and was given activations of shape {tuple(hidden.shape)}: expected (rows, tokens, "
                "hidden). Use lowmem_activations='checkpoint_fp8'."
            )
        for name in ("output_router_logits", "output_attentions"):
            if kwargs.get(name):
                raise ValueError(
                    f"{name}=True: {what} is streamed, and what its chunks would record has no gradient. Set it to "
                    "False, or use lowmem_activations='checkpoint_fp8'."
                )
        if self.has_grad_in(kwargs):
            raise ValueError(
                f"{what} is streamed and was given another tensor than its activations that wants a gradient, as cross "
                "attention is. Use lowmem_activations='checkpoint_fp8'."
            )
        weights = trained(self.module)
        if any(hasattr(p, "placements") for p in weights):
            raise ValueError(
                f"{what} is streamed and runs with weights that are in shards: its attention or MLP is sharded by "
                "itself, and gathered where the layer's gradients cannot be seen. Shard whole layers (fully_shard of "
                "each layer), or use lowmem_activations='checkpoint_fp8'."
            )
        if not (hidden.requires_grad or weights):
            return self.original(hidden, **{name: whole(value) for name, value in kwargs.items()})
        if not self.tried:
            self.tried = True
            self.try_short(hidden.detach(), kwargs)
        call = _Call(self, hidden, kwargs, self.chunk or chunk_of(hidden, self.widest))
        output = _Node.apply(call, self.seed(), hidden, *weights)
        return (output, *call.tail) if call.tail is not None else output

    def try_short(self, hidden: Tensor, kwargs: Kwargs) -> None:
        """Raise ValueError where the layer's first tokens show that it cannot run by chunks; see `trial`."""
        tokens = min(TOKENS, hidden.shape[1])
        if tokens < 2 or is_fake():
            return
        long = _Call(self, hidden, kwargs, hidden.shape[1])
        short = {name: long.cut(name, value, 0, tokens) for name, value in long.kwargs.items()}
        if "attention_mask" in kwargs:
            short["attention_mask"] = long.mask.block(0, tokens, 0)
        first = hidden[:, :tokens]
        in_chunks = partial(_Call(self, first, short, tokens // 2).first, first)
        check_by_trial(self.module, first, partial(self.original, first, **short), in_chunks)

    def by_name(self, args: Args) -> Kwargs:
        """Arguments that follow the activations, by the names that the layer has for them."""
        names = list(inspect.signature(self.original).parameters)[1 : len(args) + 1]
        return dict(zip(names, args, strict=True))

    def has_grad_in(self, kwargs: Kwargs) -> bool:
        return any(
            t.requires_grad
            for value in kwargs.values()
            for t in (value if isinstance(value, tuple | list) else (value,))
            if isinstance(t, Tensor)
        )


class _Call:
    """One call of a streamed layer: all that its passes share.

    tail: what the layer returns beside the activations; None where it returns a tensor.
    """

    def __init__(self, patch: Streamed, hidden: Tensor, kwargs: Kwargs, chunk: int) -> None:
        self.module, self.original, self.fmt, self.store = patch.module, patch.original, patch.fmt, patch.store
        self.what, self.implementation = type(patch.module).__name__, patch.implementation
        self.shape, self.dtype, self.device = hidden.shape, hidden.dtype, hidden.device
        tokens = hidden.shape[1]
        self.cache = cache_name(patch.module) or "cache"
        # A cache by another name would be filled, too.
        self.kwargs = {name: value for name, value in kwargs.items() if name not in CACHES}
        self.mask = mask_of(self.kwargs.pop("attention_mask", None), patch.implementation, self.what)
        spans = [(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk)]
        self.spans = [(*span, first) for span, first in zip(spans, self.mask.starts(spans), strict=True)]
        if is_fake():  # memory grows from chunk to chunk: the last ones have the peak, and the third sums that wait
            self.spans = [*self.spans[:1], *self.spans[1:][-PLANNED:]]
        self.draws: list[Draws | None] = []
        self.state = State(patch.module)
        self.autocast = _autocast_now(hidden.device.type)
        self.tail: Args | None = None
        self.asks_table = True  # until the first chunk shows that it does not

    def keys(self) -> Keys:
        return Keys(self.shape[1], self.what, one=len(self.spans) == 1)

    def first(self, hidden: Tensor) -> Tensor:
        """The forward pass."""
        version, keys, whole_out = version_of(hidden), self.keys(), None
        torch.clear_autocast_cache()
        for start, end, first in self.spans:
            draws = Draws(self.device)
            out = self.run(hidden[:, start:end], keys.at(start, end, first, "first"))
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
        if self.state.written() or version_of(hidden) != version:
            raise RuntimeError(
                f"{self.what} is streamed and writes to its input or to a buffer while it runs, which its chunks would "
                "do one after another. Use lowmem_activations='checkpoint_fp8'."
            )
        assert whole_out is not None
        return whole_out

    def run(self, x: Tensor, keys: Keys) -> Tensor:
        """The layer on one chunk."""
        start, end, first = keys.start, keys.end, keys.first
        causal = isinstance(self.mask, Causal)
        given = {name: self.cut(name, value, start, end) for name, value in self.kwargs.items()}
        mask = self.mask.block(start, end, first)
        if causal and start > 0 and not self.asks_table:
            mask = lower_right(end - start, end - first, self.device)
        if mask is not None or "attention_mask" in inspect.signature(self.original).parameters:
            given["attention_mask"] = mask
        chunk = Chunk(causal)
        with streaming(chunk, self.implementation):
            out = self.original(x, **{**given, self.cache: keys, "use_cache": False})
        if keys.calls != 1:
            raise ValueError(
                f"{self.what} is streamed and has not handed its keys and values to the cache that it was given, so a "
                "chunk would not see those before it. Use lowmem_activations='checkpoint_fp8' for it."
            )
        self.asks_table &= chunk.attended == 1
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
            for (start, end, first), draws in zip(reversed(self.spans), reversed(self.draws), strict=True):
                x = self.decoded(parts, start, end).requires_grad_(wants)
                with torch.enable_grad(), draws.again() if draws else contextlib.nullcontext():
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
        """Compute the keys and values of all chunks."""
        if len(self.spans) == 1:
            return
        with torch.no_grad():
            for (start, end, first), draws in zip(self.spans, self.draws, strict=True):
                x = self.decoded(parts, start, end)
                with contextlib.suppress(Filled), draws.again() if draws else contextlib.nullcontext():
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


class Context(Protocol):
    """Place of what a layer's call leaves for its backward."""

    call: _Call
    kept: Kept | None
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _Node(torch.autograd.Function):
    """(call, seed of rounding, activations, *weights) → the layer's output."""

    @staticmethod
    def forward(ctx: Context, call: _Call, seed: int | None, hidden: Tensor, *weights: Tensor) -> Tensor:
        out = call.first(hidden)
        ctx.call, parts = call, compress(hidden, call.fmt, seed=seed)
        ctx.kept = None if call.store is None else call.store.put(parts)
        ctx.save_for_backward(*(parts if ctx.kept is None else ()))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        parts = ctx.saved_tensors if ctx.kept is None else ctx.kept.get()
        return None, None, *ctx.call.second(parts, grads[0], ctx.needs_input_grad[2])


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
