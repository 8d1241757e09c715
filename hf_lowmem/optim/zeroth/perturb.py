"""A forward pass at other weights than a model has, while the model keeps its own, bit for bit.

The plain way, w += eps z before a pass and w -= eps z after it, rounds each time. In bf16 a thousand steps of it move
weights by an eighth of their size without any update (tests/optim/zeroth/test_perturb.py). A copy of the model would
take as much memory as the model. So the perturbed weights are made when a layer is entered and dropped when it is left:
at any time there is one layer more than the model, and what lies outside of the layers (embedding, last norm, head),
which others than its own module may read, such as a fused output head.

In the meantime a module's `_parameters` holds a plain tensor in the place of the parameter, as torch.func's
`functional_call` does it. The parameter itself is not touched.
"""

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from hf_lowmem.patching import ForwardPatch

__all__ = ["LayerAt", "Place", "Rng", "Substitution", "held_by", "in_place_of", "layers_of", "places_of"]

T = TypeVar("T")


class Rng:
    """States of torch's random numbers on the devices of a model, so that each pass has the same dropout."""

    def __init__(self, devices: set[torch.device]) -> None:
        self.devices, self.host = devices, torch.get_rng_state()
        kinds = [(torch.get_device_module(device), device) for device in devices if device.type not in ("cpu", "meta")]
        self.others = [(module, module.get_rng_state(device), device) for module, device in kinds]

    def restore(self) -> None:
        """Begin again where the states were taken."""
        torch.set_rng_state(self.host)
        for module, state, device in self.others:
            module.set_rng_state(state, device)


class Place(NamedTuple):
    """Where a module holds a parameter."""

    owner: nn.Module
    leaf: str
    p: nn.Parameter


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The elements of lists of modules that lie in no other such list: decoder layers, of encoders and towers too."""
    found: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                found.extend(child.children())
            else:
                walk(child)

    walk(model)
    return found


def held_by(module: nn.Module) -> dict[str, Tensor | None]:
    """Parameters that a module holds itself, by name: the very dict, to be written to."""
    return vars(module)["_parameters"]


def places_of(modules: Iterable[nn.Module], wanted: set[int] | None) -> Iterator[Place]:
    """Where some modules hold parameters of which the ids are `wanted`; None: any."""
    for owner in modules:
        for leaf, p in held_by(owner).items():
            if isinstance(p, nn.Parameter) and (wanted is None or id(p) in wanted):
                yield Place(owner, leaf, p)


@contextlib.contextmanager
def in_place_of(places: Iterable[Place], make: Callable[[nn.Parameter], Tensor]) -> Generator[None]:
    """Other tensors in the places of parameters; a parameter that has several places is made once."""
    made: dict[int, Tensor] = {}
    found: list[tuple[dict[str, Tensor | None], str, Tensor | None]] = []
    try:
        for owner, leaf, p in places:
            if id(p) not in made:
                made[id(p)] = make(p)
            held = held_by(owner)
            found.append((held, leaf, dict[str, Tensor | None].__getitem__(held, leaf)))  # FSDP2's, or the parameter
            held[leaf] = made[id(p)]
        yield
    finally:
        for held, leaf, before in found:
            held[leaf] = before


class LayerAt(ForwardPatch):
    """A layer's forward at other weights."""

    def __init__(self, module: nn.Module, places: list[Place], make: Callable[[nn.Parameter], Tensor]) -> None:
        super().__init__(module)
        self.places, self.make, self.entered = places, make, False

    def __call__(self, *args: object, **kwargs: object) -> object:
        self.entered = True
        with in_place_of(self.places, self.make):
            return self.original(*args, **kwargs)


class Substitution:
    """The places of some parameters in a model, and passes at other values of them.

    Attributes:
        store: layers of the model that are in host memory; None: none are.
        near: values of parameters that are not here themselves, by id, while other values are made of them.

    Args:
        model: of which the passes are.
        params: the parameters that are to have other values.
    """

    store: object = None  # HostLayers

    def __init__(self, model: nn.Module, params: Iterable[nn.Parameter]) -> None:
        params = list(params)
        self.near: dict[int, Tensor] = {}
        self.devices = {p.device for p in params}
        wanted = {id(p) for p in params}
        self.layers: list[tuple[nn.Module, list[Place]]] = [
            (layer, list(places_of(layer.modules(), wanted))) for layer in layers_of(model)
        ]
        inside = {m for layer, _ in self.layers for m in layer.modules()}
        self.outside: list[Place] = list(places_of((m for m in model.modules() if m not in inside), wanted))
        self.layers = [(layer, places) for layer, places in self.layers if places]
        found = {id(place.p) for _, places in self.layers for place in places} | {id(p.p) for p in self.outside}
        if wanted - found:
            raise ValueError(
                f"{len(wanted - found)} of the optimizer's parameters are not in the {type(model).__name__} that it "
                "was made for: a wrapper has replaced them. Make the optimizer for the model that is trained."
            )

    def blocks(self, layers: int) -> dict[int, int]:
        """Number of the block that each parameter is in, by id: `layers` layers are one, what is outside the last."""
        found: dict[int, int] = {}
        inside = [(i // layers, places) for i, (_, places) in enumerate(self.layers)]
        for number, places in [*inside, (len(inside), self.outside)]:
            for place in places:
                found.setdefault(id(place.p), number)
        return found

    def run_each(self, function: Callable[[], T], makes: Iterable[Callable[[nn.Parameter], Tensor]]) -> list[T]:
        """Results of `function` at the values that each of `makes` makes; each has the same random numbers."""
        rng = Rng(self.devices)

        def again() -> T:
            rng.restore()
            return function()

        return [self.run(again, make) for make in makes]

    def run(self, function: Callable[[], T], make: Callable[[nn.Parameter], Tensor]) -> T:
        """Result of `function` where each parameter `p` has the values `make(p)`, and `p` is left alone.

        A layer that is not entered by its forward, whose weights somebody else may have read, is taken to lie outside
        of the layers from then on, and `function` is called again.
        """
        while True:
            patches = [LayerAt(layer, places, make) for layer, places in self.layers]
            try:
                for patch in patches:
                    patch.put()
                with in_place_of(self.outside, make):
                    result = function()
            finally:
                for patch in patches:
                    patch.take_away()
            missed = [patch for patch in patches if not patch.entered]
            if not missed:
                return result
            for patch in missed:
                self.outside += patch.places
            self.layers = [(p.module, p.places) for p in patches if p.entered]
