"""Tier `hooks_fp8`: compress whatever a module's operators save, for modules that no better tier knows.

Autograd asks a pair of hooks about every tensor that it saves. Here the first turns it into codes and scales, the
second back. This needs no knowledge of the module, and that is its limit: it cannot know that a norm's output can be
computed again from its input, so it keeps a compressed copy of each: 10.6 U of a Llama-2-7B layer's 22.8, 11.5 of
Llama-3-8B's 24.5 (bf16, sdpa; U = tokens x hidden x 2 bytes), where tier `fp8` keeps 5.9.

Kept as they are:

- parameters and their views and casts (autocast makes such copies): a rounded weight would put its error on every
  gradient below. They are found by their graph, which leads to a parameter through views and casts alone;
- whatever no gradient flows to: buffers, frozen weights and their casts, masks, rotary tables, attention's
  log-sum-exp. Their error would be one of all gradients, and most of them are held by somebody else anyway;
- *statistics* with gradient, such as a norm's inverse root, by which backward multiplies everything. Neither dtype nor
  name tells them, but their size does: a value for a token, or for a token and head, where an activation has `hidden`
  or `head_dim`. A last dimension of 1, or less than 1/16 of the values of the module's input, stays;
- integers, booleans, 8-bit floats, complex numbers, tensor subclasses (DTensor, quantised weights), sparse tensors;
- broadcast views, whose codes would be larger than they are, and tensors in memory that is kept as it is already.

fp32 tensors are compressed like all others, even where they are casts of a bf16 one (HuggingFace's norms make such):
it would be an assumption about the module that the bf16 tensor still exists.

One tensor saved thrice is compressed once, and one that is saved under two shapes as well, as linear layers save a
flattened view. A tensor's identity is the memory that it covers: storage, offset, extent, dtype and version. The table
of identities must keep nothing alive, so all of it is weak: the reference to the storage, which nevertheless keeps the
storage's *address* from being given away, and the one to the codes, which belong to the graph alone.

Not a rule by operator: a hook sees a tensor, never the operator that saves it. Therefore a module that ends in a
log-softmax or a loss must not be wrapped: 6 % of a log-probability of -10 is a factor of two in the probability.
"""

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hf_lowmem.activations.checkpoint import WrappedForward
from hf_lowmem.activations.formats import DTYPES, compress, decompress
from hf_lowmem.activations.values import AsIs
from hf_lowmem.specs import check_integer

__all__ = ["wrap_module"]

# A tensor with fewer than this part of the input's values is a statistic, or too small to matter.
STATISTIC = 16
# Flat memory of whole groups of every format needs no padding.
WHOLE_GROUPS = 128
# Graph nodes that make another view or another precision of one tensor.
SAME_VALUES = tuple(
    f"{name}Backward"
    for name in (
        *(
            "Alias",
            "AsStrided",
            "Clone",
            "Expand",
            "Permute",
            "ReshapeAlias",
            "Select",
            "Slice",
            "Split",
            "Squeeze",
            "T",
        ),
        *("ToCopy", "Transpose", "UnsafeView", "Unsqueeze", "View"),
    )
)


class _Codes:
    """A compressed tensor. The saved places that stand for it share it; it dies with the last of them."""

    def __init__(self, x: Tensor, fmt: str, seed: int | None) -> None:
        self.parts, self.fmt, self.shape, self.dtype = compress(x, fmt, seed=seed), fmt, x.shape, x.dtype

    def decode(self) -> Tensor:
        return decompress(self.parts, self.fmt, self.shape, self.dtype)


class _Saved:
    """A place in the graph: codes, and the shape and strides under which the tensor was saved there."""

    def __init__(self, codes: _Codes, layout: tuple[torch.Size, tuple[int, ...]] | None) -> None:
        self.codes, self.layout = codes, layout

    def get(self) -> Tensor:
        x = self.codes.decode()
        return x if self.layout is None else x.as_strided(*self.layout)


def _is_parameter(tensor: Tensor) -> bool:
    """Whether the values are those of one parameter, seen or cast in another way."""
    if isinstance(tensor, nn.Parameter):
        return True
    node = tensor.grad_fn
    while node is not None and node.name().startswith(SAME_VALUES):
        node = node.next_functions[0][0]
    return isinstance(getattr(node, "variable", None), nn.Parameter)


def _in_memory_order(tensor: Tensor) -> tuple[int, ...] | None:
    """The sizes in the order of memory if the tensor covers its memory without gaps or overlaps, else None."""
    dims = sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1)
    expected = 1
    for stride, size in dims:
        if stride != expected:
            return None
        expected *= size
    return tuple(size for _, size in reversed(dims))


class _Packer:
    """The pack hook of one forward pass, and its table."""

    def __init__(self, fmt: str, min_numel: int, like: int | None, seed: int | None) -> None:
        self.fmt, self.min_numel, self.like, self.seed = fmt, min_numel, like, seed
        # Keys are the memory covered; the weak reference to the storage makes sure that it is still the same memory.
        self.table: dict[tuple[Any, ...], tuple[StorageWeakRef, weakref.ref[_Codes]]] = {}
        self.as_is: dict[int, tuple[StorageWeakRef, weakref.ref[AsIs]]] = {}

    def pack(self, tensor: Tensor) -> _Saved | AsIs:
        if is_traceable_wrapper_subclass(tensor) or tensor.layout is not torch.strided:
            return AsIs(tensor)
        storage = tensor.untyped_storage()
        if self.stays(tensor, storage):
            kept = AsIs(tensor)
            self.as_is[storage._cdata] = StorageWeakRef(storage), weakref.ref(kept)
            return kept
        sizes = _in_memory_order(tensor)
        layout = None if sizes is None else (tensor.shape, tensor.stride())
        extent = (tensor.shape, tensor.stride()) if sizes is None else tensor.numel()
        key = (storage._cdata, tensor.storage_offset(), extent, tensor.dtype, tensor._version)
        codes = self.table[key][1]() if key in self.table else None
        if codes is None:
            seed = None if self.seed is None else self.seed + (len(self.table) << 32)
            codes = _Codes(self.flat(tensor, sizes), self.fmt, seed)
            self.table[key] = StorageWeakRef(storage), weakref.ref(codes)
        return _Saved(codes, layout)

    def flat(self, tensor: Tensor, sizes: tuple[int, ...] | None) -> Tensor:
        tensor = tensor.detach()
        if sizes is None:
            return tensor
        if tensor.numel() % WHOLE_GROUPS == 0:
            sizes = (tensor.numel(),)
        return tensor.as_strided(sizes, [math.prod(sizes[i + 1 :]) for i in range(len(sizes))])

    def stays(self, tensor: Tensor, storage: torch.UntypedStorage) -> bool:
        if tensor.dtype not in DTYPES or not tensor.requires_grad or _is_parameter(tensor):
            return True
        if tensor.numel() < self.min_numel or tensor.dim() == 0 or tensor.shape[-1] == 1:
            return True
        if self.like is None:
            self.like = tensor.numel()
        if tensor.numel() * STATISTIC < self.like or storage.nbytes() < tensor.numel() * tensor.itemsize:
            return True
        kept = self.as_is.get(storage._cdata)
        return kept is not None and kept[1]() is not None

    def close(self) -> None:
        self.table, self.as_is = {}, {}


def _unpack(place: _Saved | AsIs) -> Tensor:
    return place.get()


class _Hooked(WrappedForward):
    tier = "hooks_fp8"

    def __init__(self, module: nn.Module, fmt: str, min_numel: int, seeds: Callable[[], int] | None) -> None:
        super().__init__(module, fmt, seeds)
        check_integer("min_numel", min_numel, low=0)
        self.min_numel = min_numel

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
        packer = _Packer(self.fmt, self.min_numel, max((t.numel() for t in inputs), default=None), self.seed())
        try:
            with torch.autograd.graph.saved_tensors_hooks(packer.pack, _unpack):
                return self.original(*args, **kwargs)
        finally:
            packer.close()


def wrap_module(
    module: nn.Module, *, fmt: str = "e4m3", min_numel: int = 4096, seeds: Callable[[], int] | None = None
) -> Callable[[], None]:
    """Let `module` keep compressed whatever its forward saves for backward. Returns the function that undoes it.

        undo = [wrap_module(layer) for layer in model.model.layers]     # layers, not the model with its loss

    module:     anything with a forward of deterministic operators; modules inside it are covered.
    fmt:        of hf_lowmem.activations.formats.FORMATS; "none" keeps every tensor itself, once.
    min_numel:  tensors with fewer values stay as they are.
    seeds:      called once a forward pass for the seed of stochastic rounding; None rounds to the nearest.

    The forward pass is the module's own, bit for bit, and so is everything in eval mode or without grad. Errors of the
    saved tensors do not build up from one operator to the next, as none is computed from a decompressed one: each
    backward formula has the error of its own operands. Measured in float64 on three random layers of hidden size 256:
    the gradient of a parameter is off by 3 % (median) and 8 to 11 % (worst, k_proj or q_proj) with e4m3, by 0.7 % and
    1.6 to 2.3 % with int8, which takes 11.1 U. Attention is what suffers; where that matters use int8.

    Of nested saved-tensor hooks autograd asks the innermost. Offloading outside (TRL's `activation_offloading`) gets
    nothing of a wrapped module. Inside a checkpointed region these hooks step aside: there the region's input is kept
    and nothing else. HuggingFace's own activation checkpointing of the wrapped module is an error, because the two
    settings contradict each other. In torch.compile the module runs eagerly, behind a graph break.

    Not for: layers that another tier knows (`fp8` keeps half), modules with a log-softmax or
    a loss in them, custom Functions that save integers as floats.

    Raises TypeError or ValueError for bad arguments or a module that is wrapped already.
    """
    return _Hooked(module, fmt, min_numel, seeds).install()
