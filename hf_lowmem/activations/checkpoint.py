"""Tier `checkpoint_fp8`: of a whole layer keep nothing but its input, compressed, and run the layer again in backward.

Activation checkpointing keeps the layer's input as it is, 1 U (tokens x hidden x 2 bytes). As E4M3 it is 0.51 U, for
the same second forward pass. The first forward pass is the layer's own, on the exact input: its output is bit-equal
to HuggingFace's. Only backward sees the rounding, as x' = x + d with |d| <= 6 % of |x|: what a layer computes is
exactly its backward pass at x'. Roundings do not build up in x', as no layer's x' is computed from another's.

How: torch's non-reentrant checkpoint of a function whose *argument* is the compressed input,

    parts = compress(x)
    checkpoint(run, *parts, use_reentrant=False)      # run: the first time on x, afterwards on decompress(parts)

and not a custom Function that calls `torch.autograd.backward` inside its own backward. There, an inner graph makes the
gradients of parameters: DDP does not find them in the graph that it searches, an input without gradient (frozen
embeddings) cuts the parameters off, and tensors in keyword arguments get no gradient. In the
non-reentrant form the first pass builds the real graph, with empty places where tensors would be saved, and the second
pass fills the places: gradients flow as if nothing were checkpointed.

Saved-tensor hooks that compress what checkpoint saves would do as well; but of nested hooks only the innermost are
asked. With the codes as ordinary saved tensors, hooks around the model (offloading, measuring) move or count the codes.
"""

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from hf_lowmem.activations.aside import reason_to_step_aside, say_once
from hf_lowmem.activations.detect import routing_of
from hf_lowmem.activations.formats import check_format, compress, decompress
from hf_lowmem.activations.host import HostStore
from hf_lowmem.activations.state import State
from hf_lowmem.patching import ForwardPatch, forwards_of
from hf_lowmem.reasons import NO_CHECKPOINT

__all__ = ["CACHES", "Args", "Kwargs", "RunsAgain", "WrappedForward", "is_wrapped", "wrap_layer"]

# Of a call.
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
# What layers call their cache, in transformers 5.17 to 5.24, where they are handed one that is no `Cache`, too.
CACHES = ("cache", "cache_params", "layer_past", "past_key_value", "past_key_values")


class WrappedForward(ForwardPatch, ABC):
    """A whole layer's forward in a tier that compresses without knowing what is inside of it."""

    tier = ""

    def __init__(self, module: nn.Module, fmt: str, seeds: Callable[[], int] | None) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"{self.tier} wraps an nn.Module, not {type(module).__name__}.")
        if (other := _wrapped(module)) is not None:
            raise ValueError(f"{type(module).__name__} is wrapped already, as {other.tier}: undo that first.")
        super().__init__(module)
        self.fmt, self.seeds = check_format("fmt", fmt), seeds

    def seed(self) -> int | None:
        return None if self.seeds is None else self.seeds()

    def training(self) -> bool:
        """Whether this call will be followed by a backward pass. Raises ValueError if HF checkpoints it too."""
        if not (self.module.training and torch.is_grad_enabled()):
            return False
        if getattr(self.module, "gradient_checkpointing", False):
            raise ValueError(
                f"{type(self.module).__name__} is wrapped as {self.tier} and has HuggingFace's activation "
                f"checkpointing on as well, which would run it once more and save nothing. {NO_CHECKPOINT}."
            )
        if (why := reason_to_step_aside()) is not None:
            say_once(f"lowmem_activations={self.tier!r} has no effect on a {type(self.module).__name__}: {why}.")
            return False
        return True

    # The layer runs uncompiled inside a compiled model: checkpoint recomputes with the compiler off, and would meet
    # other saved tensors than a compiled first pass has left; hooks would compress what a compiler wants to recompute.
    @torch.compiler.disable(reason="compressed activations are kept by eager code")
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs) if self.training() else self.original(*args, **kwargs)

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward when a backward pass will follow."""

    def install(self) -> Callable[[], None]:
        self.put()

        def undo() -> None:
            if self.take_away():
                return
            *_, below = (vars(self.module).get("forward"), *(patch.inner for patch in forwards_of(self.module)))
            if below not in (None, self.inner):  # else it was undone before
                raise RuntimeError(
                    f"{type(self.module).__name__}.forward was replaced by {below!r} after it was wrapped as "
                    f"{self.tier}: take that away first."
                )

        return undo


def _wrapped(module: nn.Module) -> WrappedForward | None:
    return next((patch for patch in forwards_of(module) if isinstance(patch, WrappedForward)), None)


def is_wrapped(module: nn.Module) -> bool:
    """Whether `wrap_layer` or `wrap_module` has replaced this very module's forward."""
    return _wrapped(module) is not None


class RunsAgain(WrappedForward):
    """A tier that keeps a layer's input and runs the layer once more in backward."""

    def __init__(
        self, module: nn.Module, fmt: str, seeds: Callable[[], int] | None, store: HostStore | None = None
    ) -> None:
        super().__init__(module, fmt, seeds)
        self.store = store
        if fmt != "none":
            routing = routing_of(module)
            if routing is not None:
                routing = f"routed {routing}" if routing.startswith("experts") else routing
                raise ValueError(
                    f"fmt={fmt!r}: {type(module).__name__} has {routing}. Run again from a rounded input, a token near "
                    "a tie is routed otherwise than in the forward pass. Use fmt='none', which keeps the exact input, "
                    "or another tier for this layer."
                )

    def hidden_of(self, args: Args, kwargs: Kwargs) -> tuple[Tensor, Args, Kwargs]:
        """The activations among a call's arguments, and the other arguments without a cache."""
        args, kwargs = self.without_cache(args, kwargs)
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop("hidden_states", None)
        if not isinstance(hidden, Tensor):
            raise TypeError(
                f"{type(self.module).__name__} is wrapped as {self.tier} and was called without a tensor "
                f"`hidden_states`, first or by name (got {type(hidden).__name__}). Wrap decoder layers, or undo."
            )
        return hidden, args, kwargs

    def has_grad(self, args: Args, kwargs: Kwargs) -> bool:
        tensors = (leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        return any(t.requires_grad for t in tensors) or any(p.requires_grad for p in self.module.parameters())

    def without_cache(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Take an empty cache away: the second pass would write into it again. HuggingFace's checkpointing does so.

        Args:
            args, kwargs: of the call. A cache is known by what it can do or by the parameter's name, `use_cache` by its
                name; those that are passed by position are named by the signature.
        """
        parameters = inspect.signature(self.original).parameters.values()
        names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        names += [f"argument {i}" for i in range(len(names), len(args))]
        named = dict(zip(names, args, strict=False)) | kwargs
        changes: Kwargs = {"use_cache": False} if named.get("use_cache") else {}
        if not getattr(self.module, "_can_checkpoint_with_cache", False):  # it only reads, says HuggingFace
            caches = {
                name: value
                for name, value in named.items()
                if value is not None and (name in CACHES or hasattr(value, "get_seq_length"))
            }
            for name, cache in caches.items():
                if holds_tokens(cache, self.layer_index()):
                    raise ValueError(
                        f"{type(self.module).__name__} is wrapped as {self.tier} and was called in training with a "
                        f"key-value cache that holds tokens ({name}), which a second pass would extend again. Train "
                        "without it (use_cache=False, no prefix tuning), or choose another tier."
                    )
            changes |= dict.fromkeys(caches)
        if None in changes.values():
            warnings.warn(
                f"{self.tier}: no key-value cache is filled in training; use_cache=False says so to the model.",
                stacklevel=2,
            )
        args = tuple(changes.get(name, value) for name, value in zip(names, args, strict=False))
        return args, {name: changes.get(name, value) for name, value in kwargs.items()}

    def layer_index(self) -> int:
        found = (vars(module).get("layer_idx") for module in self.module.modules())
        return next((index for index in found if isinstance(index, int)), 0)


class _Checkpointed(RunsAgain):
    tier = "checkpoint_fp8"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden, args, kwargs = self.hidden_of(args, kwargs)
        original, fmt, shape, dtype, wants = self.original, self.fmt, hidden.shape, hidden.dtype, hidden.requires_grad
        if not (wants or self.has_grad(args, kwargs)):
            return original(hidden, *args, **kwargs)
        parts = compress(hidden, fmt, seed=self.seed())
        exact = [hidden]  # taken by the first pass, so that nothing keeps it
        del hidden
        # With buffers' values: what the first pass writes to (a batch norm's statistics) is not written to twice.
        state = State(self.module, copies=True)
        kept = None if self.store is None else self.store.put(parts)
        if kept is not None:
            parts = ()

        def run(*parts: Tensor) -> Any:
            if exact:
                output = original(exact.pop(), *args, **kwargs)
                state.settle()
                return output
            x = decompress(parts if kept is None else kept.get(), fmt, shape, dtype).detach().requires_grad_(wants)
            with state.again():
                return original(x, *args, **kwargs)

        return checkpoint(run, *parts, use_reentrant=False)


def holds_tokens(cache: Any, layer: int) -> bool:
    """Whether a cache has anything for this layer: keys and values, or the state of a recurrence."""
    if not hasattr(cache, "get_seq_length"):  # tensors in a tuple or list, one a layer or all of this layer's
        return any(isinstance(leaf, Tensor) and leaf.numel() for leaf in pytree.tree_leaves(cache))
    try:
        return bool(cache.get_seq_length(layer))
    except ValueError:  # of a layer without keys and values it cannot tell
        states = vars(cache.layers[layer]).values()
        return any(isinstance(leaf, Tensor) and leaf.numel() for leaf in pytree.tree_leaves(list(states)))


def wrap_layer(
    layer: nn.Module,
    fmt: str = "e4m3",
    *,
    seeds: Callable[[], int] | None = None,
    store: HostStore | None = None,
) -> Callable[[], None]:
    """Let `layer` keep only its compressed input for the backward pass. Returns the function that undoes it.

        undo = [wrap_layer(layer) for layer in model.model.layers]

    layer:  called as layer(hidden_states, ...) or layer(hidden_states=..., ...), hidden_states (..., hidden) of bf16,
            fp16, fp32 or fp64. Other arguments are kept as they are, uncompressed, and get their gradients.
    fmt:    of hf_lowmem.activations.formats.FORMATS. "none" is torch's checkpoint, exactly.
    seeds:  called once a forward pass for the seed of stochastic rounding; None rounds to the nearest.
    store:  where the compressed input is kept; None: on its device.

    In eval mode, without grad, or where neither an input nor a parameter wants a gradient, the layer runs as it is and
    keeps nothing of ours. RNG (CPU and device), autocast and arguments are the same in the second pass.
    `layer.state_dict()`, names, class, copy and pickle do not notice.

    Keeps 0.508 U a layer (int8: 0.531) where activation checkpointing keeps 1 U, for the same second forward pass.
    Measured in float64 on three random layers of hidden size 256: the gradient of a parameter is off by 2.5 % (median)
    and 5 % (worst), with int8 by 0.5 % and 1.1 %; norm and head above the layers are exact. Beside that, torch keeps
    the state of the CPU's generator for each layer, 5 KB.

    Not for a layer whose arithmetic jumps with its input: routed experts are refused. In torch.compile the layer runs
    eagerly, behind a graph break; `fullgraph=True` is therefore an error there.

    Raises TypeError or ValueError for a bad `fmt`, a module that is no layer, one that is wrapped already; in the
    forward pass ValueError when HF's activation checkpointing is on too, or when a key-value cache holds tokens.
    """
    return _Checkpointed(layer, fmt, seeds, store).install()
