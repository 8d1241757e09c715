"""The values that backward asks for, each kept as it is, kept compressed, or computed again.

Autograd saves tensors. Inside a converted layer it saves `View`s in their place, each a window on a `Value`:

    Kept      the tensor itself, or its codes
    Derived   a function of other values: a cast, a product
    Rerun     the output of a module that is run again from its input: gate and up in tier `fp8_recompute`
    Replay    the output of a cheap module (norm, activation, dropout), and all that autograd saved inside it

Autograd's graph stays HuggingFace's own: its formulas, its order of summation. Hence a value that comes back bit for
bit gives gradients that are equal bit for bit, and a new kind of norm or activation needs no code here. An
autograd.Function a block, with a backward of its own, would have to repeat the arithmetic of every family, and of
every adapter and quantised layer on top of it. The exception, where a GPU gains by it, is what
hf_lowmem/activations/fusable.py has recognised for certain: a norm, and act(gate) * up, each an operator with a
backward pass of its own.

A value counts its future readers (`uses`) and holds what it computed only until the last of them has read: the q, k
and v projections share one recomputed norm, and nothing outlives its layer's backward. Whoever reads once more, after
`retain_graph=True`, makes it compute again.
"""

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from hf_lowmem.activations.aside import active
from hf_lowmem.activations.draws import Draws
from hf_lowmem.activations.formats import FORMATS, Grouped, compress, decompress
from hf_lowmem.activations.state import State
from hf_lowmem.patching import check_version, version_of

__all__ = ["AsIs", "Derived", "Kept", "Replay", "Rerun", "Slot", "Value", "View"]


class Value:
    """A tensor that backward needs, known by where it was in memory: `size`, `stride`, `offset`.

    A value is *dense* if it fills its span of memory without a gap; only then can parts of it be found by strides.
    """

    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    version: int
    span: int
    dense: bool

    def __init__(self, like: Tensor) -> None:
        self.uses = 0
        self.cache: Tensor | None = None
        self.locate(like)

    def locate(self, like: Tensor) -> None:
        self.size, self.stride, self.offset = like.size(), like.stride(), int(like.storage_offset())
        self.dtype, self.version = like.dtype, version_of(like)
        self.span = 1 + sum((n - 1) * s for n, s in zip(self.size, like.stride(), strict=True)) if like.numel() else 0
        self.dense = self.span == like.numel()

    def use(self) -> None:
        """One more reader. The first makes sure that there will be something to read."""
        self.uses += 1
        if self.uses == 1:
            self.prepare()

    def get(self) -> Tensor:
        """The tensor, without a graph. One reader less."""
        out = self.compute() if self.cache is None else self.cache
        self.uses -= 1
        self.cache = out if self.uses > 0 else None
        return out

    def available(self) -> bool:
        """Whether it can still be had, where nobody has asked for it yet."""
        return True

    def prepare(self) -> None:
        """Make sure that the value can be read later. Called once, before the first reader."""
        raise NotImplementedError

    def compute(self) -> Tensor:
        raise NotImplementedError

    def laid_out(self, out: Tensor) -> Tensor:
        """`out` with this value's strides, which views of it rely on."""
        if out.stride() == self.stride:
            return out
        return torch.empty_strided(self.size, self.stride, dtype=out.dtype, device=out.device).copy_(out)


class View:
    """A window on a value: what autograd holds in a saved tensor's place, and what other values compute from."""

    def __init__(self, value: Value, like: Tensor | None = None) -> None:
        self.value = value
        self.whole = True
        if like is not None:
            self.size, self.stride, self.shift = like.size(), like.stride(), like.storage_offset() - value.offset
            self.whole = self.size == value.size and self.stride == value.stride and not self.shift

    def use(self) -> "View":
        self.value.use()
        return self

    def get(self) -> Tensor:
        base = self.value.get()
        return base if self.whole else base.as_strided(self.size, self.stride, base.storage_offset() + self.shift)


class AsIs:
    """A place in the graph that holds the tensor itself, and the check for changes that autograd leaves to hooks."""

    def __init__(self, tensor: Tensor) -> None:
        # A leaf itself, anything else without its graph, which would close a circle where a node saves its output.
        self.tensor = tensor if tensor.is_leaf else tensor.detach()
        self.version = version_of(self.tensor)

    def get(self) -> Tensor:
        check_version(self.tensor, self.version)
        return self.tensor


class Kept(Value):
    """A tensor that is kept. `fmt`: as that name of FORMATS says; "none" keeps the tensor itself.

    `compact` copies a slice of a larger tensor: else the third of a fused q, k, v would keep all of it alive. It comes
    back with the strides of the slice, because torch's vectorised loops round otherwise than its strided ones.

    Raises RuntimeError on `get` if the tensor was changed in place meanwhile, as autograd itself does.
    """

    def __init__(self, tensor: Tensor, fmt: str = "none", *, compact: bool = False, seed: int | None = None) -> None:
        super().__init__(tensor)
        # Detached, because a node that holds its own output would never be freed; a leaf has no node.
        self.tensor: Tensor | None = tensor if tensor.is_leaf else tensor.detach()
        self.fmt, self.compact, self.seed = fmt, compact, seed
        self.parts: tuple[Tensor, ...] = ()

    def prepare(self) -> None:
        tensor = self.tensor
        if tensor is None:
            return
        check_version(tensor, self.version)
        if self.fmt != "none":
            rows = tensor.detach().permute(self.order).reshape(self.rows)
            self.parts, self.tensor = compress(rows, self.fmt, seed=self.seed), None
        elif self.compact and tensor.untyped_storage().nbytes() > tensor.nbytes:
            self.tensor = tensor.detach().clone()
            self.version = version_of(self.tensor)

    def available(self) -> bool:
        return self.tensor is None or version_of(self.tensor) == self.version

    @property
    def raw(self) -> bool:
        """Whether nobody has asked for it yet, so that it is neither compressed nor copied."""
        return self.tensor is not None and self.uses == 0

    def adopt(self, parts: tuple[Tensor, ...]) -> None:
        """Take the codes that a kernel has made of it on the way: the same bits as `prepare` would have made."""
        self.parts, self.tensor = parts, None

    def compute(self) -> Tensor:
        if self.tensor is None:
            flat = decompress(self.parts, self.fmt, self.rows, self.dtype)
            if self.dense:
                return flat.as_strided(self.size, self.stride)
            back = sorted(range(len(self.order)), key=self.order.__getitem__)
            return flat.view([self.size[d] for d in self.order]).permute(back)
        check_version(self.tensor, self.version)
        return self.laid_out(self.tensor)

    @property
    def order(self) -> list[int]:
        """The dimensions, ordered as they lie in memory."""
        return sorted(range(len(self.size)), key=lambda d: -self.stride[d])

    @property
    def rows(self) -> tuple[int, int]:
        """The matrix to compress: heads that lie side by side join until the format's groups fit in."""
        stored, sizes = FORMATS[self.fmt], [self.size[d] for d in self.order]
        group = stored.group if isinstance(stored, Grouped) else 1
        width = sizes.pop()
        while width % group and len(sizes) > 2:
            width *= sizes.pop()
        return math.prod(sizes), width


class Derived(Value):
    """`fn` of other values: a cast, a product."""

    def __init__(self, like: Tensor, fn: Callable[..., Tensor], *inputs: View) -> None:
        super().__init__(like)
        self.fn, self.inputs = fn, inputs

    def available(self) -> bool:
        return self.uses > 0 or all(view.value.available() for view in self.inputs)

    def prepare(self) -> None:
        for view in self.inputs:
            view.use()

    def compute(self) -> Tensor:
        with torch.no_grad():
            return self.laid_out(self.fn(*(view.get() for view in self.inputs)))


class Rerun(Value):
    """The output of `module` for `x`, computed in backward by a second run with the weights, flags, adapters, hooks,
    autocast and random numbers of the first one.

    Make it before the module runs; after the run ask `settle`, then `locate` the output.

    Args:
        run: the module's forward as it was found.
        source: where `x` can be read again. The maker holds it until it is known whether anybody needs it.
    """

    def __init__(self, module: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, source: View) -> None:
        super().__init__(x)
        self.run, self.device = run, x.device
        self.offered = weakref.ref(source)
        self.source: View | None = None
        self.needs_grad = x.requires_grad
        self.autocast = torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type)
        self.state, self.draws = State(module), Draws(x.device)

    def settle(self) -> bool:
        """Whether another run will be the same computation, now that the first one is over."""
        self.draws.settle()
        return self.draws.seen and not self.state.written() and self.available()

    def available(self) -> bool:
        source = self.source or self.offered()
        return self.source is not None or (source is not None and source.value.available())

    def prepare(self) -> None:
        if self.source is None and (source := self.offered()):
            self.source = source.use()

    def compute(self) -> Tensor:
        assert self.source is not None
        x = self.source.get()
        with torch.no_grad(), self.again():
            return self.laid_out(self.run(x))

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Context in which all that the run depends on, except its input, is as it was. No tape listens."""
        (enabled, dtype), kind, tape = self.autocast, self.device.type, active.tape
        with contextlib.ExitStack() as stack:
            if enabled or torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            if self.draws.states:
                stack.enter_context(self.draws.again())
            stack.enter_context(self.state.again())
            active.tape = None
            try:
                yield
            finally:
                active.tape = tape


class Slot:
    """The i-th tensor that autograd saved inside a module: of a replayed one it is computed, else it is `kept`."""

    def __init__(self, replay: "Replay", index: int) -> None:
        self.replay, self.index = replay, index
        self.kept: View | AsIs | None = None

    def get(self) -> Tensor:
        return self.replay.slot(self.index) if self.kept is None else self.kept.get()


class Replay(Rerun):
    """A cheap module's output, and its inside: what autograd saved there is had by running the module again.

    The first reader, mostly a projection that needs the output for the gradient of its weight, runs the module; the
    module's own backward, which comes last, finds everything ready.

    `dropout`: the module is one of torch's dropouts. Its mask comes from the random numbers alone, so that its input is
    kept only if somebody reads the output. Of any other module that draws random numbers the tensors are kept, because
    they are small beside its input (DropPath's mask is a number for each sample).
    """

    def __init__(
        self, module: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, source: View, *, dropout: bool
    ) -> None:
        super().__init__(module, run, x, source)
        self.dropout = dropout
        self.slots = self.unread = 0
        self.saved: dict[int, Tensor] = {}

    def place(self) -> Slot:
        """A slot for one more tensor that autograd saves while the module runs."""
        if not self.dropout:
            self.prepare()
        self.slots += 1
        self.unread += 1
        return Slot(self, self.slots - 1)

    def settle(self) -> bool:
        same = super().settle() and (self.dropout or not self.draws.states)
        if not same and self.source is not None:
            self.source.value.uses -= 1
            self.source = None
        return same

    def slot(self, index: int) -> Tensor:
        if index not in self.saved:
            output = self.replay()
            self.cache = output if self.uses > 0 else None
        self.unread -= 1
        return self.saved.pop(index)

    def compute(self) -> Tensor:
        return self.replay() if self.unread > 0 else super().compute()

    def replay(self) -> Tensor:
        """Run the module, catch what autograd saves; the output without its graph."""
        self.state.check()
        saved: list[Tensor] = []

        def catch(tensor: Tensor) -> int:
            saved.append(tensor.detach())
            return len(saved) - 1

        if self.source is not None:
            x = self.source.get().detach()
        else:
            x = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)
        hooks = torch.autograd.graph.saved_tensors_hooks(catch, saved.__getitem__)
        with torch.enable_grad(), self.again(), hooks:
            output = self.run(x.requires_grad_(self.needs_grad))
        if len(saved) != self.slots:
            raise RuntimeError(
                f"{self.state.name} saved {self.slots} tensors for backward in the forward pass and {len(saved)} when "
                "it ran again: it, or which of its weights are trained, has changed in between."
            )
        self.saved = dict(enumerate(saved))
        return self.laid_out(output.detach())
