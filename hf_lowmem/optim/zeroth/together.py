"""Forward passes at several weights, side by side: each layer is on the device once, for all of them.

A pass is the host's own code, from its batch to its loss, and knows nothing of the others. So each runs in a thread of
its own, and at any time one of them alone: it stops where it enters a layer, and goes on when that layer is on the
device and its turn has come. What is the thread's own in torch (autocast, modes, the current stream) is taken over from
the caller; what is the process's and differs between passes is exchanged at each stop: random numbers, the weights
outside of the layers, and which adapters are on, which a loss with a reference switches. A pass's result is that of the
pass alone, bit for bit.

Why not both in one batch of twice the size, as ZO2 has it: embedding, norms and head have other weights in each pass,
too, and a loss is whatever its trainer makes of the batch. Every model would have to be written again.
"""

import contextlib
from collections.abc import Callable, Generator, Iterable
from contextvars import copy_context
from functools import partial
from threading import Semaphore, Thread
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from hf_lowmem.optim.state import dispatch_modes
from hf_lowmem.optim.zeroth.offload import FIELD, PASS, Block, HostLayers
from hf_lowmem.optim.zeroth.perturb import Place, Rng, Substitution, in_place_of, places_of

__all__ = ["Together"]

T = TypeVar("T")


SWITCHES = ("_disable_adapters", "_active_adapter")  # of PEFT's layers


class Switches:
    """Settings of modules by which PEFT's adapters are on or off, and which of them, as they are now."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.found = [(module, name, getattr(module, name)) for module in modules for name in SWITCHES]

    def restore(self) -> None:
        """Set them as they were."""
        for module, name, value in self.found:
            vars(module)[name] = value


class Stopped(BaseException):
    """Ends a pass whose result nobody will ask for."""


class Pass(Generic[T]):
    """One of the passes, which runs from layer to layer.

    Args:
        function: makes it.
        make: weights at which it runs.
        outside: places of the weights that lie outside of the layers.
        trained: of each block, those places whose weights `make` makes.
        rng: random numbers that it begins with.
        adapters: modules that have SWITCHES.
    """

    def __init__(
        self,
        function: Callable[[], T],
        make: Callable[[nn.Parameter], Tensor],
        outside: list[Place],
        trained: dict[Block, list[Place]],
        rng: Rng,
        adapters: list[nn.Module],
    ) -> None:
        self.function, self.make, self.outside, self.trained, self.rng = function, make, outside, trained, rng
        self.adapters, self._switches = adapters, Switches(adapters)
        self.awaited: Block | None = None
        self.entered: set[Block] = set()
        self.results: list[T] = []
        self._made: dict[int, Tensor] = {}  # of the weights outside, by the id of a parameter
        self._error: BaseException | None = None
        self._stopped = False
        self._turn, self._others = Semaphore(0), Semaphore(0)
        self._around = contextlib.ExitStack()
        around = around_here(rng.devices)
        self._thread = Thread(target=copy_context().run, args=(self._run, around), daemon=True)

    def go(self) -> None:
        """Run to the next layer, or to the end."""
        self.awaited = None
        if self._thread.ident is None:
            self._thread.start()
        self._turn.release()
        self._others.acquire()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End it where it is."""
        self._stopped = True
        if self._thread.ident is not None:
            self._turn.release()
            self._thread.join()

    def _run(self, around: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        PASS.set(self)
        self._turn.acquire()
        try:
            with around(), torch.no_grad():
                self._made = {id(p): self.make(p) for p in {id(place.p): place.p for place in self.outside}.values()}
                self.rng.restore()
                self._switches.restore()
                with self._around:
                    self._around.enter_context(in_place_of(self.outside, self._mine))
                    self.results.append(self.function())
                    self._around.close()
        except Stopped:
            pass
        except BaseException as error:  # raised again by who waits for it
            self._error = error
        self._others.release()

    def _mine(self, p: nn.Parameter) -> Tensor:
        return self._made[id(p)]

    @contextlib.contextmanager
    def at(self, block: Block) -> Generator[None]:
        """See `Entering`."""
        self._around.close()
        rng, switches = Rng(self.rng.devices), Switches(self.adapters)
        self.awaited = block
        self._others.release()
        self._turn.acquire()
        if self._stopped:
            raise Stopped
        self.entered.add(block)
        rng.restore()
        switches.restore()
        self._around.enter_context(in_place_of(self.outside, self._mine))
        ours = {id(place.p) for place in self.trained[block]}
        with in_place_of(block.places, lambda p: self.make(p) if id(p) in ours else block.near[id(p)]):
            yield


class Together(Substitution):
    """Passes at other weights of a model whose layers are in host memory.

    Args:
        model: of which the passes are.
        params: the parameters that are to have other values.
        store: the layers.
    """

    def __init__(self, model: nn.Module, params: Iterable[nn.Parameter], store: HostLayers) -> None:
        params = list(params)
        super().__init__(model, params)
        wanted = {id(p) for p in params}
        self.store, self.layers_there, self.devices = store, store, {store.device}
        self.trained = {block: [p for p in block.places if id(p.p) in wanted] for block in store.blocks}
        inside = {id(place.p) for places in self.trained.values() for place in places}
        self.outside = list(places_of(model.modules(), wanted - inside))
        self.adapters = [m for m in model.modules() if all(hasattr(m, name) for name in SWITCHES)]

    def run_each(self, function: Callable[[], T], makes: Iterable[Callable[[nn.Parameter], Tensor]]) -> list[T]:
        rng, switches = Rng(self.devices), Switches(self.adapters)
        passes = [Pass(function, make, self.outside, self.trained, rng, self.adapters) for make in makes]
        try:
            for each in passes:
                each.go()
            while (block := next((each.awaited for each in passes if each.awaited is not None), None)) is not None:
                with self.layers_there.visit(block, self.layers_there.after[block]):
                    for each in passes:
                        if each.awaited is block:
                            each.go()
        finally:
            for each in passes:
                each.stop()
            switches.restore()
        for each in passes:
            self._check_entered(each.entered)
        return [result for each in passes for result in each.results]

    def _check_entered(self, entered: set[Block]) -> None:
        """Raise where a pass has left out a layer: somebody may have read its weights, which are not on the device."""
        missed = next((block for block, places in self.trained.items() if places and block not in entered), None)
        if missed is not None:
            raise RuntimeError(
                f"{FIELD}: a {type(missed.layer).__name__} whose weights are trained was not entered in a forward "
                "pass, so it would not be where the pass looks for it, or would be moved by losses that know nothing "
                "of it. Leave lowmem_offload unset; or switch off what skips layers (layerdrop)."
            )


def around_here(devices: set[torch.device]) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A context in which another thread is to torch what this one is now, but for gradients."""
    kinds = {"cpu", *(device.type for device in devices)}
    enter: list[Callable[[], contextlib.AbstractContextManager[object]]] = [
        partial(torch.autocast, kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        for kind in sorted(kinds)
    ]
    enter += [
        lambda device=device: torch.cuda.stream(torch.cuda.current_stream(device))
        for device in devices
        if device.type == "cuda"
    ]
    enter += [lambda mode=mode: mode for mode in dispatch_modes()]
    if (default := torch.get_default_device()).type != "cpu":
        enter.append(lambda: default)

    @contextlib.contextmanager
    def around() -> Generator[None]:
        with contextlib.ExitStack() as stack:
            for make in enter:
                stack.enter_context(make())
            yield

    return around
