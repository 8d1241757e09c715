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

import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from hf_lowmem.activations.aside import reason_to_step_aside
from hf_lowmem.activations.checkpoint import Args, Kwargs, RunsAgain
from hf_lowmem.activations.detect import is_linear
from hf_lowmem.activations.fusable import is_fake
from hf_lowmem.activations.host import HostStore
from hf_lowmem.activations.streaming import attention
from hf_lowmem.activations.streaming.call import Call
from hf_lowmem.activations.streaming.chains import Chains
from hf_lowmem.activations.streaming.masks import Lazy, whole
from hf_lowmem.activations.streaming.node import Node
from hf_lowmem.activations.streaming.trial import TOKENS, check_by_trial
from hf_lowmem.activations.streaming.weights import trained

__all__ = ["Streamed", "chunk_of", "wrap_streamed"]

ROOM = 2**30  # bytes that a chunk's graph may take
MASK_ROOM = 2**28  # and its mask, where attention needs one
STEP = 256  # tokens; a chunk is a multiple of it
# Keys that torch's kernel on a CPU takes at once: in whole ones, sums are those of a whole layer to the bit.
CPU_STEP = 512


def chunk_of(hidden: Tensor, widest: int) -> int:
    """Tokens of a chunk: as many as a graph in ROOM holds, of about 23 tensors of the hidden size and 5 of the widest
    linear one (counted on Llama), and attention's mask in MASK_ROOM where it needs one."""
    rows, tokens, width = hidden.shape
    chunk = ROOM // (rows * (23 * width + 5 * widest) * hidden.element_size())
    step = STEP
    if not attention.on_accelerator(hidden):
        chunk, step = min(chunk, MASK_ROOM // (rows * tokens * hidden.element_size())), CPU_STEP
    return max(step, chunk // step * step)


def wrap_streamed(
    layer: nn.Module,
    tier: str,
    fmt: str,
    chunk: int | None,
    implementation: str,
    seeds: Callable[[], int] | None,
    store: HostStore | None = None,
    chains: Chains | None = None,
    follows: bool = False,
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
        chains: of the layers that share inputs; None where it keeps its own.
        follows: whether the layer before it shares them, too.
    """
    Streamed(layer, tier, fmt, chunk, implementation, seeds, store, chains or Chains(1), follows).install()


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
        chains: Chains,
        follows: bool,
    ) -> None:
        self.tier = tier
        super().__init__(module, fmt, seeds, store)
        self.chunk, self.implementation, self.tried = chunk, implementation, False
        self.hands_mask = False  # as far as is known
        self.chains, self.follows = chains, follows
        linears = [m for m in module.modules() if is_linear(m)]
        self.widest = max((int(getattr(m, "out_features", None) or getattr(m, "nf", 0)) for m in linears), default=0)

    @torch.compiler.disable(reason="streamed layers are run by eager code")
    def __call__(self, *args: object, **kwargs: object) -> object:
        if self.training():
            return self.forward(*args, **kwargs)
        alone = not torch.is_grad_enabled() and reason_to_step_aside() is None
        if alone and any(isinstance(value, Lazy) for value in (*args, *kwargs.values())):
            return self.passed(*args, **kwargs)
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
            self.chains.broken()
            return self.original(hidden, **{name: whole(value) for name, value in kwargs.items()})
        if not self.tried:
            self.tried = True
            self.try_short(hidden.detach(), kwargs)
        call = self.call(hidden, kwargs, self.chunk or chunk_of(hidden, self.widest), self.seed())
        chain, start = self.chains.joined(call, hidden, self.follows)
        output = Node.apply(call, chain, start, self.store, hidden, *weights)
        assert isinstance(output, Tensor)
        self.chains.returned(chain, output)
        return (output, *call.tail) if call.tail is not None else output

    def passed(self, *args: object, **kwargs: object) -> object:
        """The forward pass alone, by the same chunks: a mask of the whole would be tokens times tokens."""
        hidden, args, kwargs = self.hidden_of(args, kwargs)
        kwargs = self.by_name(args) | kwargs
        if not self.tried:
            self.tried = True
            self.try_short(hidden, kwargs)
        call = self.call(hidden, kwargs, self.chunk or chunk_of(hidden, self.widest))
        output = call.first(hidden)
        return (output, *call.tail) if call.tail is not None else output

    def call(self, hidden: Tensor, kwargs: Kwargs, chunk: int, seed: int | None = None) -> Call:
        how = (chunk, seed, self.hands_mask)
        return Call(self.module, self.original, self.fmt, self.implementation, hidden, kwargs, *how)

    def try_short(self, hidden: Tensor, kwargs: Kwargs) -> None:
        """Raise ValueError where the layer's first tokens show that it cannot run by chunks; see `trial`."""
        tokens = min(TOKENS, hidden.shape[1])
        if tokens < 2 or is_fake():
            return
        long = self.call(hidden, kwargs, hidden.shape[1])
        short = {name: long.cut(name, value, 0, tokens) for name, value in long.kwargs.items()}
        if "attention_mask" in kwargs:
            short["attention_mask"] = long.mask.block(0, tokens, 0)
        first = hidden[:, :tokens]
        call = self.call(first, short, tokens // 2)
        check_by_trial(self.module, first, partial(self.original, first, **short), partial(call.first, first))
        self.hands_mask = short.get("attention_mask") is not None and call.asks_table

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
