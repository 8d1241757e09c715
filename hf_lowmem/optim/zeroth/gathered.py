"""Forward passes at other weights of a model that FSDP2 has cut: what it gathers is moved, and its shards are not.

Each process has some rows of a weight, and FSDP2 gathers the whole before the module that needs it runs. There, when
that module's forward begins, other values are put in the place of what was gathered: each process makes all of a
layer's direction, which is the same numbers on all of them, and nothing more is sent than in any forward pass. An
update makes the part of a direction that belongs to the rows that are here (`ZerothOrder`).

    a decoder layer                         other values while its forward runs
    what is outside (embedding, head)       from the first forward of its unit of FSDP2 to the end of the pass; what is
                                            gathered is given back then, and a pass that comes next gathers again

A plain pass would move them for good: FSDP2 keeps what its root has gathered until a backward pass, which never comes,
and would run the next step at weights of before the update.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import methodcaller
from typing import TypeVar

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from hf_lowmem.distributed import is_sharded
from hf_lowmem.optim.zeroth.perturb import LayerAt, Place, Substitution, held_by, in_place_of, places_of
from hf_lowmem.patching import ForwardPatch

__all__ = ["Gathered", "give_back"]

T = TypeVar("T")
state_of = methodcaller("_get_fsdp_state")  # what FSDP2 knows of a unit


def give_back(model: nn.Module) -> None:
    """Have FSDP2 let go of what it has gathered; the parameters of all modules are shards then."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class UnitAt(ForwardPatch):
    """The forward of a module that FSDP2 gathers for, whose weights stay as they are put until the pass has ended."""

    def __init__(self, module: nn.Module, puts: Callable[[], None]) -> None:
        super().__init__(module)
        self.puts, self.entered = puts, False

    def __call__(self, *args: object, **kwargs: object) -> object:
        self.entered = True
        self.puts()
        return self.original(*args, **kwargs)


class Gathered(Substitution):
    """Passes at other weights of a model that FSDP2 has cut.

    Args:
        model: of which the passes are.
        params: those that are to have other values; mostly shards.
    """

    def __init__(self, model: nn.Module, params: Iterable[nn.Parameter]) -> None:
        give_back(model)
        super().__init__(model, params)
        self.model = model
        every = [place for _, places in self.layers for place in places] + self.outside
        self.place: dict[int, Place] = {id(place.p): place for place in every}
        wanted = {id(place.p) for place in self.outside}
        inside = {m for layer, _ in self.layers for m in layer.modules()}
        units: dict[int, tuple[list[nn.Module], list[Place]]] = {}  # one of FSDP2's units may have several modules
        for module in model.modules():
            if isinstance(module, FSDPModule) and module not in inside:
                modules, places = units.setdefault(id(state_of(module)), ([], []))
                modules.append(module)
                places += places_of((m for m in _own(module) if m not in inside), wanted)
        self.units = [(modules, places) for modules, places in units.values() if places]
        known = {place for _, places in self.units for place in places}
        self.uncut = [place for place in self.outside if place not in known]

    def run(self, function: Callable[[], T], make: Callable[[nn.Parameter], Tensor]) -> T:
        """See `Substitution.run`. For `make` a parameter's values are what FSDP2 has gathered: `near`.

        Raises:
            RuntimeError: where a part of the model was not entered, whose weights somebody else may have read.
        """
        make = partial(self._made, make)
        layers = [LayerAt(layer, places, make) for layer, places in self.layers]
        puts = [(modules, partial(self._put, places, make, {})) for modules, places in self.units]
        units = [[UnitAt(module, put) for module in modules] for modules, put in puts]
        patches = [*layers, *(patch for unit in units for patch in unit)]
        try:
            for patch in patches:
                patch.put()
            with in_place_of(self.uncut, make):
                result = function()
        finally:
            for patch in patches:
                patch.take_away()
            give_back(self.model)
            for place in self.outside:
                held_by(place.owner)[place.leaf] = place.p
        missed = [patch.module for patch in layers if not patch.entered]
        missed += [unit[0].module for unit in units if not any(patch.entered for patch in unit)]
        if missed:
            raise RuntimeError(
                f"under FSDP2 a forward pass went around a {type(missed[0]).__name__} whose weights are trained, so "
                "other weights could not be put in their places. Call the model that FSDP2 has wrapped, "
                "switch off what skips layers (layerdrop), or train in one process."
            )
        return result

    def _put(self, places: list[Place], make: Callable[[nn.Parameter], Tensor], put: dict[int, Tensor]) -> None:
        """Put other values in some places, but where they are: FSDP2 may have gathered again. `put`: what is there."""
        with_others = [place for place in places if held_by(place.owner)[place.leaf] is not put.get(id(place.p))]
        fresh = {id(place.p): place.p for place in with_others}
        put |= {ident: make(p) for ident, p in fresh.items()}
        for owner, leaf, p in with_others:
            held_by(owner)[leaf] = put[id(p)]

    def _made(self, make: Callable[[nn.Parameter], Tensor], p: nn.Parameter) -> Tensor:
        owner, leaf, _ = self.place[id(p)]
        found = held_by(owner)[leaf]
        if found is None or is_sharded(found):
            raise RuntimeError(
                f"a weight of {type(owner).__name__} is still cut where its layer begins: FSDP2 gathers it within the "
                "layer, and a method of zeroth order moves the weights of a whole layer. Call fully_shard on layers, "
                "on the embedding and on the model, as accelerate does."
            )
        self.near[id(p)] = found.detach()
        try:
            return make(p)
        finally:
            del self.near[id(p)]


def _own(unit: nn.Module) -> Iterator[nn.Module]:
    """The modules of a unit of FSDP2 that are in no unit within it."""
    yield unit
    for child in unit.children():
        if not isinstance(child, FSDPModule):
            yield from _own(child)
