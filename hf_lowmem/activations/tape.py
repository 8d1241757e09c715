"""One call of one layer: which of the tensors that autograd saves are the same, and which can be computed again.

`Tape.pack` is asked for every tensor that autograd saves in a layer. It knows a tensor by its storage, since one is
saved under many shapes: sdpa's output (B, H, T, D) is the output projection's input (B*T, H*D). It keeps a value
once, and it does not keep what it can *prove* to be computable from what is kept:

    the output of a replayed module     the tape saw it being made
    a product                           its node is a multiplication, and has saved both factors
    a cast or a copy                    its node is a cast or a copy, and the edge behind it leads, through reshapes and
                                        transpositions, to something known: autocast's copies of inputs and of weights
    keys and values, repeated           its node is the copy of an expanded tensor, and knows of which size
    what a kernel has made              the kernel returned the codes that it can be made of again

The proof is the autograd graph itself, read in every forward pass. Nothing is concluded from a name or a class, so a
model that computes something else than its relatives do merely keeps more. What the graph does not know the tape does
not either: a result that is written to through `.data` before it is saved comes back as it was computed. And it is a
proof for what was made in this very call: a cast or a clone from before may be older than the weight that it is of.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hf_lowmem.activations.aside import active
from hf_lowmem.activations.origin import is_bias
from hf_lowmem.activations.values import AsIs, Derived, Kept, Replay, Rerun, Slot, Value, View
from hf_lowmem.kernels.glu import GLU, glu_rows
from hf_lowmem.kernels.quantize import GROUPS
from hf_lowmem.kernels.rmsnorm import RMSNORM_AGAIN, rmsnorm_rows
from hf_lowmem.memory.saved import innermost_pack

__all__ = ["FORMATS_OF_TIER", "Formats", "Tape", "is_plain", "unpack"]

# Fewer values a token than this (a norm's 1/rms, a router's logits, a small adapter's inside) are not worth a scale.
SMALL = 32


@dataclass(frozen=True)
class Formats:
    """Formats in which a tier stores what it keeps: names of `formats.FORMATS`.

    Attributes:
        residual: for the inputs of norms and of blocks.
        attention, mlp: for what autograd saves inside of these.
        rerun: the MLP's projections of its input (gate and up) are not kept but computed again in backward.
    """

    residual: str = "none"
    attention: str = "none"
    mlp: str = "none"
    rerun: bool = False


FORMATS_OF_TIER = {
    "exact": Formats(),
    "fp8": Formats("e4m3", "int8", "e4m3"),
    "fp8_recompute": Formats("e4m3", "int8", "e4m3", rerun=True),
}


# Nodes that give the same values, in the same order, another shape, and know the shape before.
RESHAPES = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")

# A function and what to call it with.
Formula = tuple[Callable[..., Tensor], tuple[View, ...]]


def unpack(packed: View | Slot | AsIs) -> Tensor:
    """The hook for autograd that turns what was packed into a tensor again."""
    if active.peeked is not None:
        active.peeked.append(packed)
        return torch.empty(0)
    return packed.get()


def factors(node: Any) -> list[Any]:
    """Both factors that a MulBackward0 node saved, as packed: reading `_saved_self` calls `unpack`, which notes it."""
    active.peeked = []
    try:
        _ = node._saved_self, node._saved_other
        return active.peeked
    finally:
        active.peeked = None


class Tape:
    """The values of one layer's call. `hidden`: the layer's input (..., hidden size), which is kept first.

    `seed`: rounds stochastically. The tape ends with the layer's forward; values live as long as the graph needs them.
    """

    def __init__(self, formats: Formats, hidden: Tensor, seed: int | None) -> None:
        self.formats, self.seed = formats, seed
        self.batch, self.tokens = hidden.shape[0], max(hidden.numel() // hidden.shape[-1], 1)
        self.kind: str | None = None
        self.block_input: Tensor | None = None
        self.known: dict[int, list[tuple[weakref.ref, Value]]] = {}
        self.by_node: dict[tuple[Any, int], tuple[Value, weakref.ref[Tensor]]] = {}
        # Nodes that made activations. Those below `first` are older than this call.
        self.activations: set[Any] = set()
        self.first = torch._C._autograd._get_sequence_nr()  # type: ignore[attr-defined]
        self.depends = hidden.requires_grad
        self.offered: list[View] = []
        self.kept = 0
        self.enter(hidden)

    def enter(self, x: Tensor) -> None:
        """Take `x` for a block's input."""
        self.view(x, self.formats.residual)
        self.activations.add(x.grad_fn)

    @property
    def listens(self) -> bool:
        """Whether it is this tape that autograd would ask now: not a checkpoint inside the layer, nor other hooks."""
        return getattr(innermost_pack(), "__self__", None) is self

    def pack(self, tensor: Tensor) -> View | AsIs:
        return self.view(tensor).use() if is_plain(tensor) else AsIs(tensor)

    def view(self, tensor: Tensor, fmt: str | None = None) -> View:
        """`tensor` as a window on a known value, or on a new one, kept as `fmt` or as the scope and its looks say."""
        value = self.find(tensor)
        if value is None:
            base = tensor if tensor._base is None else tensor._base
            value = self.explain(base)
            if value is None:
                base = base if self.as_a_whole(base, tensor) else tensor
                value = self.keep(base, fmt or self.format_of(base))
            self.remember(base, value)
            if not self.covers(value, tensor):
                value = self.keep(tensor, fmt or self.format_of(tensor))
        return View(value, tensor)

    def keep(self, tensor: Tensor, fmt: str, compact: bool = False) -> Kept:
        compact = compact or (self.kind == "attention" and tensor.requires_grad and not tensor.is_leaf)
        return Kept(tensor, fmt, compact=compact, seed=self.next_seed())

    def next_seed(self) -> int | None:
        self.kept += 1
        return None if self.seed is None else self.seed + self.kept

    def as_a_whole(self, base: Tensor, part: Tensor) -> bool:
        """Whether to keep `base` rather than a view of it: where all of it will be saved, as gate and up in one are."""
        if base.dtype != part.dtype:
            return False
        return base.numel() == part.numel() or (self.kind == "mlp" and not base.is_leaf and base.is_contiguous())

    def format_of(self, tensor: Tensor) -> str:
        """The scope's format, if these are activations of its tokens; weights, masks and the like stay as they are."""
        ours = (
            self.kind is not None
            and tensor.requires_grad
            and tensor.is_floating_point()
            and not tensor.is_leaf
            and tensor.ndim > 0
            and tensor.shape[0] in (self.batch, self.tokens)
            and tensor.numel() % self.tokens == 0
            and tensor.numel() >= SMALL * self.tokens
            and not self.is_bias(tensor)
        )
        return self.scope_format if ours else "none"

    def is_bias(self, tensor: Tensor) -> bool:
        """Whether this may be attention's scores or what was added to them. A linear's output is (B, T, H) or less."""
        if self.kind != "attention" or tensor.ndim < 3 or tensor.grad_fn is None or self.scope_format == "none":
            return False
        return is_bias(tensor.grad_fn, self.activations, self.depends)

    @property
    def scope_format(self) -> str:
        return self.formats.residual if self.kind is None else getattr(self.formats, self.kind)

    def find(self, tensor: Tensor) -> Value | None:
        storage = tensor.untyped_storage()
        for ref, value in self.known.get(storage._cdata, ()):
            # An address is given out again once its storage is gone, hence the weak reference.
            if ref() is not storage or value.version != tensor._version or not self.covers(value, tensor):
                continue
            if value.available():
                return value
        return None

    @staticmethod
    def covers(value: Value, tensor: Tensor) -> bool:
        if value.dtype != tensor.dtype:
            return False
        start = tensor.storage_offset() - value.offset
        if start == 0 and tensor.size() == value.size and tensor.stride() == value.stride:
            return True
        reach = sum((n - 1) * s for n, s in zip(tensor.size(), tensor.stride(), strict=True))
        return value.dense and start >= 0 and start + reach < value.span

    def remember(self, tensor: Tensor, value: Value) -> None:
        storage = tensor.untyped_storage()
        self.known.setdefault(storage._cdata, []).append((weakref.ref(storage), value))
        if tensor.grad_fn is not None:
            self.by_node[tensor.grad_fn, tensor.output_nr] = value, weakref.ref(tensor)

    def explain(self, tensor: Tensor) -> Value | None:
        """`tensor` as a function of known values, if the graph says that it is one."""
        node = tensor.grad_fn
        # Changed in place, it is no longer what the node has made. What was made before this call may have been made of
        # something that has changed since: of weights that were cloned, cast or updated.
        if node is None or tensor._version or node._sequence_nr() < self.first:
            return None
        if node.name() == "UnsafeViewBackward0" and (repeated := self.explain_repeat(tensor, node)):
            return repeated
        cast = node.name() == "ToCopyBackward0"
        made = self.formula(node.next_functions[0] if cast else (node, tensor.output_nr), tensor.size())
        if made is None:
            return None
        (fn, inputs), dtype, device = made, tensor.dtype, tensor.device
        return Derived(tensor, lambda *values: fn(*values).to(device, dtype), *inputs)

    def formula(self, edge: tuple[Any, int], size: Sequence[int]) -> Formula | None:
        """The formula for the tensor of this size that an edge of the graph stands for; None where none is found.

        Casts inside it end the search: a node does not tell the dtype of what it made, only a tensor does.
        """
        node, (value, made) = edge[0], self.by_node.get(edge, (None, None))
        if value is not None and made is not None:
            output = made()
            same = value.available() and (output is None or output._version == value.version)
            return (_itself, (View(value),)) if same and value.size == size else None
        if node is None:
            return None
        if (leaf := getattr(node, "variable", None)) is not None:
            return (_itself, (self.view(leaf),)) if leaf.size() == size and is_plain(leaf) else None
        if node._sequence_nr() < self.first:
            return None
        name = node.name()
        if name == "MulBackward0":
            saved = factors(node)
            known = len(saved) == 2 and all(isinstance(view, View) for view in saved)
            return (torch.mul, tuple(saved)) if known else None
        if name == "CloneBackward0":
            return self.formula(node.next_functions[0], size)
        if name in RESHAPES:
            before = self.formula(node.next_functions[0], torch.Size(node._saved_self_sym_sizes))
            return before and (_then(before[0], lambda t: t.reshape(size)), before[1])
        if name == "TransposeBackward0":
            dims = node._saved_dim0, node._saved_dim1
            if max(dims) >= len(size):  # a negative dimension is saved as 2**64 less something
                return None
            sizes = list(size)
            sizes[dims[0]], sizes[dims[1]] = sizes[dims[1]], sizes[dims[0]]
            before = self.formula(node.next_functions[0], torch.Size(sizes))
            return before and (_then(before[0], lambda t: t.transpose(*dims)), before[1])
        return None

    def explain_repeat(self, tensor: Tensor, node: Any) -> Value | None:
        """HuggingFace's repeat_kv: (B, K, T, D), expanded to (B, K, n, T, D), copied to (B, K*n, T, D). K are kept."""
        copy = node.next_functions[0][0]
        expand = copy.next_functions[0][0] if copy is not None and copy.name() == "CloneBackward0" else None
        if expand is None or expand.name() != "ExpandBackward0" or tensor.ndim != 4:
            return None
        once = tuple(expand._saved_self_sym_sizes)
        batch, heads, *rest = tensor.shape
        if len(once) != 5 or once[2] != 1 or once[0] != batch or once[3:] != tuple(rest) or heads % once[1]:
            return None
        times = heads // once[1]
        kept = self.keep(tensor[:, ::times], self.format_of(tensor), compact=True)
        return Derived(tensor, lambda t: t.repeat_interleave(times, 1), View(kept))

    def replay(self, module: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, dropout: bool) -> Tensor:
        """Run a cheap module; of all that it saves and returns, only its input is kept, of a dropout not even that.

        If running it again would not be the same, what it saves is kept as if nobody had looked.
        """
        value = Replay(module, run, x, self.offer(x), dropout=dropout)
        places: list[tuple[Slot, Tensor]] = []

        def pack(tensor: Tensor) -> Slot:
            places.append((value.place(), tensor))
            return places[-1][0]

        try:
            with saved_tensors_hooks(pack, unpack):
                output = run(x)
            if value.settle():
                return self.made(value, output, x)
            for slot, tensor in places:
                slot.kept = self.pack(tensor)
            return output
        finally:
            places.clear()

    def rerun(self, module: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Run a module whose output need not be kept. What it saves inside is kept as ever."""
        value = Rerun(module, run, x, self.offer(x))
        output = run(x)
        return self.made(value, output, x) if value.settle() else output

    def norm(self, x: Tensor, weight: Tensor, eps: float, plus_one: bool, cast_first: bool) -> Tensor | None:
        """RMSNorm by a kernel that gives the codes of x as well; None where x is not to be kept as E4M3, or is by now.

        Backward reads the codes twice, for the output that projections need and for the norm itself, and nothing else.
        """
        kept = self.offer(x).value
        if not (isinstance(kept, Kept) and kept.fmt == "e4m3" and kept.raw and x.is_contiguous() and weight.is_leaf):
            return None
        rows, size, dtype = x.view(-1, x.shape[-1]), x.size(), x.dtype
        if kept.size != size or kept.rows != rows.size():
            return None
        y, codes, scales = rmsnorm_rows(rows, weight, eps, plus_one, cast_first, kept.seed)
        kept.adopt((codes, scales))
        y = y.view(size)

        def again(codes: Tensor, scales: Tensor, weight: Tensor) -> Tensor:
            return RMSNORM_AGAIN(codes, scales, weight, eps, plus_one, cast_first, dtype).view(size)

        self.remember(y, Derived(y, again, self.view(codes), self.view(scales), self.view(weight)))
        return y

    def glu(self, gate: Tensor, up: Tensor, act: str) -> Tensor | None:
        """act(gate) * up by a kernel; None where it does not apply. Of gate and up codes are kept, which the kernel
        gives as well, or, where they can be run again, nothing."""
        if not (gate.requires_grad and up.requires_grad and gate.size() == up.size() and gate.dtype == up.dtype):
            return None
        size, dtype = gate.size(), gate.dtype
        gate_rows, up_rows = gate.flatten(0, -2), up.flatten(0, -2)
        # Halves of one matrix that are not whole groups have fewer scales where the matrix is kept as one.
        whole = gate.is_contiguous() or not size[-1] % GROUPS["e4m3"].group
        if self.formats.mlp == "e4m3" and whole and self.find(gate) is None and self.find(up) is None:
            out, *saved = glu_rows(gate_rows, up_rows, act, (self.next_seed(), self.next_seed()))

            def again(gate: Tensor, *rest: Tensor) -> Tensor:
                gate_scales, up, up_scales = rest
                return GLU(gate, up, gate_scales, up_scales, act, dtype).view(size)
        else:
            out, saved = GLU(gate_rows, up_rows, None, None, act, dtype), [gate_rows, up_rows]

            def again(gate: Tensor, *rest: Tensor) -> Tensor:
                return GLU(gate, *rest, None, None, act, dtype).view(size)

        out = out.view(size)
        self.remember(out, Derived(out, again, *map(self.view, saved)))
        return out

    def offer(self, x: Tensor) -> View:
        """The input of a module, held here until the layer ends: by then it is known whether it will be needed."""
        self.offered.append(self.view(x, "none" if self.is_bias(x) else self.scope_format))
        return self.offered[-1]

    def made(self, value: Value, output: Tensor, x: Tensor) -> Tensor:
        if isinstance(output, Tensor) and output.untyped_storage() is not x.untyped_storage():
            value.locate(output)
            self.remember(output, value)
            self.activations.add(output.grad_fn)
        return output

    @contextmanager
    def scope(self, kind: str, x: Tensor) -> Iterator[None]:
        """Context of a block, "attention" or "mlp", with input `x`: what is saved inside takes that block's format."""
        self.enter(x)
        before = self.kind, self.block_input
        self.kind, self.block_input = kind, x
        try:
            yield
        finally:
            self.kind, self.block_input = before

    def close(self) -> None:
        """Let go of all values that nobody will read, and of the graph's nodes. Called when the layer is done."""
        self.known.clear()
        self.offered.clear()
        self.by_node.clear()
        self.activations.clear()


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is a window on memory, and nothing else: not sparse, no wrapper around other tensors."""
    usual = type(tensor) in (Tensor, nn.Parameter) or not is_traceable_wrapper_subclass(tensor)
    return usual and tensor.layout is torch.strided


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _then(first: Callable[..., Tensor], second: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda *values: second(first(*values))
