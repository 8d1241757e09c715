"""What backward will ask for, and how it is had: kept as it is, kept compressed, or computed again.

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

from hf_lowmem.activations.formats import FORMATS, Grouped, compress, decompress

__all__ = ["Context", "Derived", "Kept", "Replay", "Rerun", "Slot", "Value", "View"]


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
        self.dtype, self.version = like.dtype, like._version
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

    def prepare(self) -> None:
        """Once, before the first reader."""
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
        if self.fmt != "none":
            rows = tensor.detach().permute(self.order).reshape(self.rows)
            self.parts, self.tensor = compress(rows, self.fmt, seed=self.seed), None
        elif self.compact and tensor.untyped_storage().nbytes() > tensor.nbytes:
            self.tensor = tensor.detach().clone()
            self.version = self.tensor._version

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
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{self.tensor.type()} {list(self.size)}] is at version {self.tensor._version}; expected version "
                f"{self.version} instead."
            )
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

    def prepare(self) -> None:
        for view in self.inputs:
            view.use()

    def compute(self) -> Tensor:
        with torch.no_grad():
            return self.laid_out(self.fn(*(view.get() for view in self.inputs)))


class Context:
    """Autocast, and with `rng` the random numbers, as they were when it was made; `with context():` has them back."""

    def __init__(self, device: torch.device, rng: bool) -> None:
        self.device = device
        self.autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        self.rng = _get_rng(device) if rng else None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        (enabled, dtype), kind = self.autocast, self.device.type
        with contextlib.ExitStack() as stack:
            if enabled or torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            if self.rng is not None:
                stack.callback(_set_rng, _get_rng(self.device), self.device)
                _set_rng(self.rng, self.device)
            yield


def _get_rng(device: torch.device) -> Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def _set_rng(state: Tensor, device: torch.device) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


class Rerun(Value):
    """What `module` makes of `x`, by running it again with the same weights, autocast and, with `rng`, random numbers.

    To be made before the module runs. `run`: its forward as it was found; `source`: what `x` will be had from, for the
    maker to hold until it is known whether anybody needs it. `locate` is to be called with the output.
    """

    def __init__(
        self, module: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, source: View, *, rng: bool
    ) -> None:
        super().__init__(x)
        self.module, self.run, self.context = module, run, Context(x.device, rng)
        self.offered = weakref.ref(source)
        self.source: View | None = None
        self.needs_grad = x.requires_grad
        self.versions = self.weight_versions()

    def prepare(self) -> None:
        if self.source is None and (source := self.offered()):
            self.source = source.use()

    def compute(self) -> Tensor:
        assert self.source is not None
        self.check_weights()
        with torch.no_grad(), self.context():
            return self.laid_out(self.run(self.source.get()))

    def weight_versions(self) -> list[int]:
        return [p._version for p in self.module.parameters()]

    def check_weights(self) -> None:
        if self.weight_versions() != self.versions:
            raise RuntimeError(
                f"a weight of {type(self.module).__name__} was changed in place between the forward pass and the "
                "backward pass, which needs it to compute the module's output again. Step the optimizer after backward."
            )


class Slot:
    """The i-th tensor that autograd saved inside a replayed module."""

    def __init__(self, replay: "Replay", index: int) -> None:
        self.replay, self.index = replay, index

    def get(self) -> Tensor:
        return self.replay.slot(self.index)


class Replay(Rerun):
    """A cheap module's output, and its inside: what autograd saved there is had by running the module again.

    The first reader, mostly a projection that needs the output for the gradient of its weight, runs the module; the
    module's own backward, which comes last, finds everything ready.

    With `rng` the module is a dropout: its mask comes from the random numbers alone, so that its input is kept only if
    somebody reads the output.
    """

    def __init__(
        self, module: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, source: View, *, rng: bool
    ) -> None:
        super().__init__(module, run, x, source, rng=rng)
        self.blind = rng
        self.slots = self.unread = 0
        self.saved: dict[int, Tensor] = {}

    def pack(self, tensor: Tensor) -> Slot:
        """A hook for autograd while the module runs: nothing is kept but the place in the order of saving."""
        if not self.blind:
            self.prepare()
        self.slots += 1
        self.unread += 1
        return Slot(self, self.slots - 1)

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
        self.check_weights()
        saved: list[Tensor] = []

        def catch(tensor: Tensor) -> int:
            saved.append(tensor.detach())
            return len(saved) - 1

        if self.source is not None:
            x = self.source.get().detach()
        else:
            x = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.context.device)
        hooks = torch.autograd.graph.saved_tensors_hooks(catch, saved.__getitem__)
        with torch.enable_grad(), self.context(), hooks:
            output = self.run(x.requires_grad_(self.needs_grad))
        if len(saved) != self.slots:
            raise RuntimeError(
                f"{type(self.module).__name__} saved {self.slots} tensors for backward in the forward pass and "
                f"{len(saved)} when it ran again: it, or which of its weights are trained, has changed in between."
            )
        self.saved = dict(enumerate(saved))
        return self.laid_out(output.detach())
