"""Everything but its input that a module computes with, kept so that a second run is the same computation.

Between a forward and its backward pass a module may change: `set_adapter` makes another adapter the active one,
`eval()` switches dropouts off, `torch.func.functional_call` has lent it weights and taken them back, hooks come and
go. Plain autograd does not notice, because it has kept what it needs. Whoever computes again must therefore have the
module as it was. A `State` is that: of every module below, the attributes (flags, adapters, hooks, submodules) and the
very tensors that stood in them. `again()` puts them back for the time of a second run and then leaves the module as it
found it.

The values of tensors are not copied. What was written in place is known by its version counter: a tensor that the
module itself writes to while it runs (a batch norm's statistics, spectral_norm's vectors) makes a second run another
one, and `written()` says so; one that somebody writes to before backward is an error, as in autograd. Attributes are
seen, and what is in dicts, lists and sets, and a generator of the module's own; the insides of other objects are not.
"""

import contextlib
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowmem.patching import version_of

__all__ = ["State"]

_ABSENT = object()
_VALUES = frozenset((bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size))
_MAPPINGS = (dict, OrderedDict)
_MUTABLE = frozenset((*_MAPPINGS, list, set))
_CONTAINERS = _MUTABLE | {tuple}
_MERGED = "merged_adapters"
_KEPT = (Tensor, torch.Generator)


def _placements(tensor: Tensor) -> Any:
    return getattr(tensor, "placements", None)


class _Held:
    """A tensor of a module: itself if it is a leaf, else without its graph, which would live on with it."""

    __slots__ = ("copy", "counts", "of", "tensor", "version", "wants")

    def __init__(self, tensor: Tensor) -> None:
        self.wants = tensor.requires_grad
        self.counts = True  # whether another version is another value
        self.version = version_of(tensor)
        self.copy: Tensor | None = None
        self.of: weakref.ref[Tensor] | None = None
        self.tensor = tensor
        if not tensor.is_leaf:
            self.of, self.tensor = weakref.ref(tensor), tensor.detach().requires_grad_()

    def is_written(self) -> bool:
        """Whether its values may have changed in place."""
        return self.counts and version_of(self.tensor) != self.version

    def is_still(self, value: Any) -> bool:
        tensor = self.tensor if self.of is None else self.of()
        if tensor is value:
            return value.requires_grad == self.wants and self.copy is None
        # FSDP2 puts whole weights and shards in each other's place, as its own state has it: that is left to FSDP2.
        return isinstance(value, Tensor) and _placements(value) != _placements(self.tensor)

    def thawed(self) -> Tensor:
        if self.copy is not None:
            return self.copy.clone()  # what runs again may write to it
        of = None if self.of is None else self.of()
        tensor = self.tensor if of is None else of
        return tensor if tensor.requires_grad == self.wants else tensor.detach().requires_grad_(self.wants)


def _frozen(value: Any, held: list[_Held]) -> Any:
    """`value` as it is now: containers are copied, tensors held."""
    kind = type(value)
    if kind in _VALUES:
        return value
    if kind in _MAPPINGS:
        return kind((key, _frozen(item, held)) for key, item in value.items())
    if kind is list or kind is tuple:
        return kind(_frozen(item, held) for item in value)
    if isinstance(value, Tensor):
        held.append(_Held(value))
        return held[-1]
    if kind is set:
        return set(value)
    return value.clone_state() if kind is torch.Generator else value


def _thawed(frozen: Any) -> Any:
    kind = type(frozen)
    if kind is _Held:
        return frozen.thawed()
    if kind in _MAPPINGS:
        return kind((key, _thawed(item)) for key, item in frozen.items())
    if kind is list or kind is tuple:
        return kind(map(_thawed, frozen))
    if kind is set:
        return set(frozen)
    return frozen.clone_state() if kind is torch.Generator else frozen


def _same(frozen: Any, now: Any) -> bool:
    kind = type(frozen)
    if kind is _Held:
        return frozen.is_still(now)
    if frozen is now:
        return True
    if kind is not type(now):
        return False
    if kind in _MAPPINGS:
        return frozen.keys() == now.keys() and all(map(_same, frozen.values(), map(now.__getitem__, frozen)))
    if kind is list or kind is tuple:
        return len(frozen) == len(now) and all(map(_same, frozen, now))
    return (kind is set or kind in _VALUES) and frozen == now


class _Part:
    """One module's attributes.

    plain: all of them, name → object; empty: containers with nothing in them; full: name → what its container, tensor
    or generator was like. Most modules have the same attributes when they run again, so that is found out first.
    owner: holds tensors with a graph as they are, for the time of a run.
    """

    __slots__ = ("empty", "full", "now", "plain")

    def __init__(self, now: dict[str, Any], held: list[_Held], owner: bool = False) -> None:
        self.now = now
        self.plain = self.now.copy()
        self.empty: list[Any] = []
        self.full: dict[str, Any] = {}
        for key, item in now.items():
            kind = type(item)
            if kind in _CONTAINERS:
                if item:
                    self.full[key] = _frozen(item, held)
                else:
                    self.empty.append(item)
            elif kind not in _VALUES and isinstance(item, _KEPT):
                self.full[key] = _frozen(item, held)
                if not owner and isinstance(item, Tensor) and not item.is_leaf:
                    self.plain[key] = _ABSENT

    def unchanged(self) -> bool:
        same = len(self.now) == len(self.plain) and all(map(is_, self.plain.values(), self.now.values()))
        if not same or any(self.empty):
            return False
        return all(_same(frozen, self.now[key]) for key, frozen in self.full.items())

    def lend(self) -> None:
        """Give the module the attributes that it had, in containers of their own.

        Raises RuntimeError where PEFT has merged adapters or unmerged them: it writes weights by way of `.data`, which
        no version counter sees.
        """
        now, emptied = self.now, {id(item): type(item) for item in self.empty}
        if _MERGED in self.plain and list(self.full.get(_MERGED, ())) != now.get(_MERGED):
            raise RuntimeError(
                f"adapters were merged or unmerged ({self.full.get(_MERGED, [])} before, {now.get(_MERGED)} now) "
                "between the forward pass and the backward pass, which needs the weights as they were. Merge after "
                "backward."
            )
        for key, item in self.plain.items():
            if key in self.full:
                if not _same(self.full[key], now.get(key, _ABSENT)):
                    now[key] = _thawed(self.full[key])
            elif id(item) in emptied:
                now[key] = emptied[id(item)]()
            elif now.get(key, _ABSENT) is not item:
                now[key] = item
        for key in now.keys() - self.plain.keys():
            del now[key]

    def give_back(self) -> None:
        """Undo what a second run has done to the module: it may count its calls, or set a flag once more."""
        now = self.now
        for key, item in self.plain.items():
            if item is not _ABSENT and now.get(key, _ABSENT) is not item:
                now[key] = item
            if key in self.full and type(item) in _MUTABLE and not _same(self.full[key], item):
                _refill(item, _thawed(self.full[key]))
        for container in filter(len, self.empty):
            container.clear()
        for key in now.keys() - self.plain.keys():
            del now[key]


def _refill(container: Any, items: Any) -> None:
    container.clear()
    (container.extend if type(container) is list else container.update)(items)


def _tree(module: nn.Module) -> list[nn.Module]:
    """`module` and all below it, as `modules()` has them, at a third of the cost."""
    found, seen = [module], {module}
    for parent in found:
        for child in parent._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def _set_anew(tree: list[nn.Module]) -> set[int]:
    """Ids of the parameters to which PEFT adds its LoRA by a parametrization that is there for one call.

    torch sets such a parameter to itself when it is registered, which counts as a change in place and is none.
    """
    found = (getattr(part, "get_param", None) for part in tree if "parameter_name" in vars(part))
    return {id(parameter()) for parameter in found if callable(parameter)}


class State:
    """`module` and all modules below it, as they are when it is made.

    copies: keeps the values of buffers as well. After the run `settle()` lets go of those that it did not write to; the
    others are had back by `again()`, so that a second run neither reads nor leaves what the first one wrote.
    """

    def __init__(self, module: nn.Module, copies: bool = False) -> None:
        self.name = type(module).__name__
        self.held: list[_Held] = []
        tree = _tree(module)
        self.parts = [_Part(vars(part), self.held) for part in tree]
        if set_anew := _set_anew(tree):
            for held in self.held:
                held.counts = held.wants or id(held.tensor) not in set_anew
        if copies:
            for part in self.parts:
                for buffer in filter(None, part.full.get("_buffers", {}).values()):
                    buffer.copy = buffer.tensor.detach().clone()

    def written(self) -> bool:
        """Whether a tensor was written to."""
        return any(held.is_written() for held in self.held)

    def settle(self) -> None:
        """Drop the copies of tensors that the module's run has not written to. Call it after that run."""
        for held in self.held:
            if not held.is_written():
                held.copy = None

    def check(self) -> None:
        """Raise RuntimeError if a second run could not have the values of the first."""
        if any(held.copy is None and held.is_written() for held in self.held):
            raise RuntimeError(
                f"a weight or a buffer of {self.name} was changed in place between the forward pass and the backward "
                "pass, which needs it to compute the module's output again. Step the optimizer after backward."
            )

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """The modules as they were, and afterwards as they are. Raises RuntimeError where they cannot be."""
        self.check()
        present: list[_Part] = []
        try:
            for part in self.parts:
                if part.unchanged():
                    present.append(part)
                else:
                    present.append(_Part(part.now, [], owner=True))
                    part.lend()
            yield
        finally:
            for part in present:
                if not part.unchanged():
                    part.give_back()
