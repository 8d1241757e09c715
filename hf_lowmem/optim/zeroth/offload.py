"""Weights of layers in host memory: a layer comes to the device when it is entered, and one beside it is on its way.

A method of zeroth order needs a layer's weights for its forward passes and for one update, so what ZO2 (arXiv
2503.12668) found holds: a layer may come once a step. What both passes do with it is done while it is there (see
together.py). The update that follows from their losses is known only when the last layer has gone; it waits, with its
own step's learning rate, seed and slope, and is made when the layer comes the next time. Whoever reads a weight before
that, by way of the module that has it, waits for the update (`Guarded`): a state dict, a checkpoint, `parameters()`.

    down    the next layer is copied to the device while this one runs
    up      a layer that was updated is copied back while it runs, and let go after that

Each way has a stream of its own. Memory on the device is given up only after the computing stream was told to wait for
the copy, so torch's allocator, which knows that stream alone, never hands out what is being copied. On a CPU the same
code copies to other memory of the same kind, so that what is computed there is what a device computes.

A layer in host memory is for forward passes without gradients, of training and evaluation alike, and stays so when a
training has ended: the device may have no room for it. `bring_back` ends it.
"""

import contextlib
import functools
from _collections_abc import dict_items, dict_values
from collections.abc import Callable, Generator, Iterator
from contextvars import ContextVar
from operator import attrgetter
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hf_lowmem.memory import host
from hf_lowmem.optim.zeroth.perturb import Place, in_place_of, layers_of, places_of
from hf_lowmem.patching import ForwardPatch, forwards_of

__all__ = ["Block", "HostLayer", "HostLayers", "bring_back", "host_layers_of", "put_in_host"]

FIELD = "lowmem_offload='weights'"
REMEDY = "Leave lowmem_offload unset, or train fewer weights a device: adapters, or a smaller model"
Update = Callable[[Tensor], None]  # changes the values that it is handed


class Entering(Protocol):
    """One of several passes that share what is on the device."""

    def at(self, block: "Block") -> contextlib.AbstractContextManager[None]:
        """Where the weights of a layer are those of this pass; it is on the device when that begins."""
        ...


PASS: ContextVar[Entering | None] = ContextVar("PASS", default=None)  # the one that this thread makes


class Guarded(dict[str, nn.Parameter | None]):
    """Parameters of a module by name, of which nobody gets one that still has an update to come.

    Args:
        block: whose they are.
        found: what the module had.
    """

    def __init__(self, block: "Block", found: dict[str, nn.Parameter | None]) -> None:
        super().__init__(found)
        self.block = block

    def __getitem__(self, name: str) -> nn.Parameter | None:
        self.block.settle()
        return super().__getitem__(name)

    def items(self) -> "dict_items[str, nn.Parameter | None]":
        self.block.settle()
        return super().items()

    def values(self) -> "dict_values[str, nn.Parameter | None]":
        self.block.settle()
        return super().values()

    def __reduce__(self) -> tuple[type[dict[str, nn.Parameter | None]], tuple[dict[str, nn.Parameter | None]]]:
        return dict, (dict(self.items()),)


class Block:
    """A layer whose weights are in host memory.

    Args:
        store: of all of them.
        layer: the module.
        places: of its weights, which no other module has.
    """

    def __init__(self, store: "HostLayers", layer: nn.Module, places: list[Place]) -> None:
        self.store, self.layer, self.places = store, layer, places
        self.updates: list[tuple[nn.Parameter, Update]] = []  # still to be made
        self.near: dict[int, Tensor] = {}  # values on the device, by the id of a parameter
        self.inside = False  # whether it is on the device for somebody
        self.arrived: torch.Event | None = None
        self.written: torch.Event | None = None  # what was updated is in host memory; None: it is, or nothing was

    def parameters(self) -> Iterator[nn.Parameter]:
        """Each of its weights once."""
        yield from {id(place.p): place.p for place in self.places}.values()

    def settle(self) -> None:
        """Let host memory have the values that the weights have by now."""
        if self.inside:
            return
        if self.updates:
            with self.store.visit(self):
                pass
        if self.written is not None:
            self.written.synchronize()
            self.written = None


class HostLayers:
    """The layers of a model that are in host memory, and the ways between there and a device.

    Args:
        device: on which they run.
        found: layers, and the places of the weights that each has for itself.
    """

    def __init__(self, device: torch.device, found: list[tuple[nn.Module, list[Place]]]) -> None:
        self.device = device
        on_cuda = device.type == "cuda"
        self.down, self.up = (torch.cuda.Stream(device) if on_cuda else None for _ in range(2))
        self.blocks = [Block(self, layer, places) for layer, places in found]
        self.after = dict(zip(self.blocks, [*self.blocks[1:], None], strict=True))
        self._blocks = {id(p): block for block in self.blocks for p in block.parameters()}
        self.visits = 0  # of all blocks, so far
        self._coming: Block | None = None

    def of(self, p: Tensor) -> Block | None:
        """The block that a weight is in."""
        return self._blocks.get(id(p))

    def catch_up(self) -> None:
        """Make all updates that wait, in one trip through the layers."""
        waiting = [block for block in self.blocks if block.updates]
        for block, after in zip(waiting, [*waiting[1:], None], strict=False):
            with self.visit(block, after):
                pass

    def settle(self) -> None:
        """Let host memory have the values that all weights have by now."""
        self.catch_up()
        for block in self.blocks:
            block.settle()

    @contextlib.contextmanager
    def visit(self, block: Block, after: Block | None = None) -> Generator[None]:
        """A layer's weights on the device, in `block.near`, updated; `after` is on its way meanwhile."""
        self._take(block)
        block.inside, self.visits = True, self.visits + 1
        try:
            if after is not None:
                self._begin(after)
            if block.updates:
                self._update(block)
            yield
        finally:
            if block.written is not None:  # the memory may be given up after that
                self._wait(block.written)
            block.near, block.inside = {}, False

    def _take(self, block: Block) -> None:
        if self._coming is not block:
            self._begin(block)
        self._coming = None
        if block.arrived is not None:
            self._wait(block.arrived)

    @torch.no_grad()
    def _begin(self, block: Block) -> None:
        """Begin to copy a layer to the device."""
        if (other := self._coming) is not None:  # which nobody has asked for
            self._take(other)
            other.near = {}
        block.near = {id(p): torch.empty_like(p, device=self.device) for p in block.parameters()}
        pairs = [(block.near[id(p)], p.detach()) for p in block.parameters()]
        block.arrived = self._copy(self.down, pairs, block.written)
        self._coming = block

    @torch.no_grad()
    def _update(self, block: Block) -> None:
        for p, update in block.updates:
            update(block.near[id(p)])
        pairs = [(p.detach(), block.near[id(p)]) for p, _ in block.updates]
        block.updates = []
        block.written = self._copy(self.up, pairs)

    def _copy(
        self, stream: "torch.cuda.Stream | None", pairs: list[tuple[Tensor, Tensor]], first: torch.Event | None = None
    ) -> torch.Event | None:
        """Copy from the second to the first of each pair, after `first`; what tells that it is done."""
        if stream is None:
            for target, source in pairs:
                target.copy_(source)
            return None
        stream.wait_stream(torch.cuda.current_stream(self.device))
        if first is not None:
            stream.wait_event(first)
        with torch.cuda.stream(stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return stream.record_event()

    def _wait(self, event: torch.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)


class HostLayer(ForwardPatch):
    """The forward of a layer that is in host memory. A copy of the model has plain layers, on the CPU."""

    def __init__(self, block: Block) -> None:
        super().__init__(block.layer)
        self.block = block

    def __reduce__(self) -> tuple[type[ForwardPatch], tuple[nn.Module], dict[str, object]]:
        return Passed, (self.module,), {"inner": self.inner}

    def __call__(self, *args: object, **kwargs: object) -> object:
        current, block = PASS.get(), self.block
        if current is not None:
            with current.at(block):
                return self.original(*args, **kwargs)
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{FIELD}: the weights of {type(self.module).__name__} are in host memory, for forward passes alone, "
                "and this one keeps what a backward pass would need. Run it under torch.no_grad(); for gradients "
                "bring the model back first: hf_lowmem.optim.zeroth.bring_back(model)."
            )
        store = block.store
        with store.visit(block, store.after[block]), in_place_of(block.places, lambda p: block.near[id(p)]):
            return self.original(*args, **kwargs)


class Passed(ForwardPatch):
    """A layer's plain forward, which a copy of a model has in the place of `HostLayer`."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self.original(*args, **kwargs)


class Stay:
    """`_apply` of a module whose weights are in host memory: buffers go to a device, weights stay where they are."""

    def __init__(self, module: nn.Module, block: Block) -> None:
        self.module, self.block = module, block

    def __reduce__(self) -> tuple[object, tuple[object, nn.Module]]:
        return functools.partial, (apply_of(self.module), self.module)

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        ours = {place.leaf: place.p for place in self.block.places if place.owner is self.module}
        held: dict[str, nn.Parameter | None] = vars(self.module)["_parameters"]
        for p in ours.values():
            dtype = fn(torch.empty(0, dtype=p.dtype)).dtype
            if dtype != p.dtype:
                self.block.settle()
                p.data = moved(p.detach().to(dtype), self.block.store.device)
        others = {name: p for name, p in dict[str, nn.Parameter | None].items(held) if name not in ours}
        vars(self.module)["_parameters"] = others
        try:
            apply_of(self.module)(self.module, fn, recurse)
        finally:
            vars(self.module)["_parameters"] = held
            held.update(others)
        return self.module


class ZeroGrad:
    """`zero_grad` of a model with layers in host memory, which have no gradients: a step must not wait for them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __reduce__(self) -> tuple[object, tuple[object, nn.Module]]:
        return functools.partial, (type(self.model).zero_grad, self.model)

    def __call__(self, set_to_none: bool = True) -> None:
        for module in self.model.modules():
            held: dict[str, nn.Parameter | None] = vars(module)["_parameters"]
            for p in dict[str, nn.Parameter | None].values(held):
                if p is not None and p.grad is not None:
                    p.grad = None if set_to_none else p.grad.zero_()


def apply_of(module: nn.Module) -> Callable[..., nn.Module]:
    """A module's way of moving itself, by its class."""
    return attrgetter("_apply")(type(module))


def moved(values: Tensor, device: torch.device) -> Tensor:
    """The same values in host memory that `device` copies from."""
    buffer = host.buffer_of(values.nbytes, device, FIELD)
    return buffer.view(values.dtype).view(values.shape).copy_(values)


def kept(p: nn.Parameter, device: torch.device) -> nn.Parameter:
    """A parameter whose values are in host memory from here on: the same object."""
    p.data = moved(p.detach(), device)
    return p


def put_in_host(model: nn.Module, device: torch.device | str) -> HostLayers:
    """Keep the weights of a model's layers in host memory, from where each comes to `device` when it runs.

    What lies outside of the layers, or is shared by several, goes to `device` with `model.to(device)` as ever. Again is
    nothing.

    Raises:
        ValueError: where the model has no layers with weights of their own, or weights that are no plain tensors; or
            where the host has no memory for them.
    """
    if (known := host_layers_of(model)) is not None:
        return known
    device = torch.device(device)
    layers = layers_of(model)
    inside = {module for layer in layers for module in layer.modules()}
    homes: dict[int, set[nn.Module | None]] = {}
    for home, modules in [
        *((layer, layer.modules()) for layer in layers),
        (None, (m for m in model.modules() if m not in inside)),
    ]:
        for place in places_of(modules, None):
            homes.setdefault(id(place.p), set()).add(home)
    own = {ident for ident, found in homes.items() if len(found) == 1 and None not in found}
    found = [(layer, list(places_of(layer.modules(), own))) for layer in layers]
    found = [(layer, places) for layer, places in found if places]
    if not found:
        raise ValueError(
            f"{FIELD} has no effect: {type(model).__name__} has no list of layers with weights of their own. Leave it "
            "unset."
        )
    every = {id(place.p): place for _, places in found for place in places}
    for place in every.values():
        if is_traceable_wrapper_subclass(place.p) or not place.p.is_floating_point():
            raise ValueError(
                f"{FIELD}: a weight of {type(place.owner).__name__} is {type(place.p).__name__} of {place.p.dtype}, "
                "and plain tensors of floating point alone can wait in host memory. Load the model without "
                "quantization, or leave lowmem_offload unset."
            )
    missing = sum(place.p.nbytes for place in every.values() if place.p.device.type != "cpu")
    host.check_host(missing, FIELD, "the layers", REMEDY)
    there = {ident: kept(place.p, device) for ident, place in every.items()}
    found = [(layer, [place._replace(p=there[id(place.p)]) for place in places]) for layer, places in found]
    for owner, leaf, p in (place for _, places in found for place in places):
        vars(owner)["_parameters"][leaf] = p
    store = HostLayers(device, found)
    for block in store.blocks:
        for owner in dict.fromkeys(place.owner for place in block.places):
            vars(owner)["_parameters"] = Guarded(block, vars(owner)["_parameters"])
            vars(owner)["_apply"] = Stay(owner, block)
        HostLayer(block).put()
    vars(model)["zero_grad"] = ZeroGrad(model)
    return store


def host_layers_of(model: nn.Module) -> HostLayers | None:
    """The layers of a model that are in host memory; None for a model that has none."""
    patches = (patch for module in model.modules() for patch in forwards_of(module))
    return next((patch.block.store for patch in patches if isinstance(patch, HostLayer)), None)


def bring_back(model: nn.Module) -> None:
    """Bring a model's layers back to their device, for good. Does nothing where they are not in host memory."""
    store = host_layers_of(model)
    if store is None:
        return
    store.settle()
    for block in store.blocks:
        for owner in dict.fromkeys(place.owner for place in block.places):
            vars(owner)["_parameters"] = dict(vars(owner)["_parameters"])
            del vars(owner)["_apply"]
        for p in block.parameters():
            p.data = p.detach().to(store.device, copy=True)
        for patch in [p for p in forwards_of(block.layer) if isinstance(p, HostLayer)]:
            patch.take_away()
    for module in model.modules():
        if isinstance(vars(module).get("zero_grad"), ZeroGrad):
            del vars(module)["zero_grad"]
