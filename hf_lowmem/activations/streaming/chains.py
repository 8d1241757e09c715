"""Layers of which every Nth keeps its input: `stream/4`, `stream_fp8/4`.

A layer's input is the output of the layer before, so it can be had again from there by one more forward pass in chunks,
which needs no graph. A *chain* is up to N calls one after another, of which the first has kept its input. When backward
comes to the last one, the others run forward once more, and the inputs between wait, in the tier's format, until their
layers' own backward has used them. So of L layers there are L/N + N - 1 inputs at once instead of L, for (N - 1)/N of
another forward pass.

That a layer's input *is* the output of the one before is no matter of names: a model may add something between two
layers (visual features), a hook may hand in another tensor, FSDP2 may cast it. So a call joins a chain only where it is
given the very memory that the last call has returned, unchanged since. Else it keeps its input, and a warning says so.

What `stream/N` computes in backward is what `stream` computes there, to the bit. In `stream_fp8/N` inputs in between
are made from the chain's first as it was rounded, so they are rounded otherwise than those of `stream_fp8`.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from hf_lowmem.activations.aside import say_once
from hf_lowmem.activations.formats import compress
from hf_lowmem.activations.host import Kept
from hf_lowmem.activations.streaming.call import Call
from hf_lowmem.activations.streaming.weights import gathered
from hf_lowmem.patching import version_of

__all__ = ["Chain", "Chains", "Sharing", "Start"]

# What the first layer of a chain has kept: tensors, or where they are in host memory.
Start = tuple[Tensor, ...] | Kept


class Chain:
    """Calls of one forward pass, of which the first has kept its input. Lives as long as the graph does.

    made: inputs of later calls that backward has made, and not used yet; of the first call's, what came back from host
        memory.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.made: dict[int, tuple[Tensor, ...]] = {}
        self._start: tuple[weakref.ref[Tensor], ...] | weakref.ref[Kept] | None = None

    def started(self, start: Start) -> None:
        """Note what the first call has kept, which autograd holds and nobody else."""
        self._start = weakref.ref(start) if isinstance(start, Kept) else tuple(map(weakref.ref, start))

    def start(self) -> Start | None:
        """Return what the first call has kept; None where that is gone."""
        if not isinstance(self._start, tuple):
            return None if self._start is None else self._start()
        found = [part() for part in self._start]
        return tuple(part for part in found if part is not None) if None not in found else None

    def input_of(self, place: int, kept: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """The input of a call, in its format, for its backward pass. `kept` gives the first call's."""
        if place and place not in self.made:
            self._make(place, tuple(kept()))
        return self.made.pop(place, None) or kept()

    def _make(self, last: int, parts: tuple[Tensor, ...]) -> None:
        """Run the calls before `last` once more, each on what the one before has given."""
        self.made[0] = parts  # else it would come from host memory a second time
        hidden: Tensor | None = None
        for place, (call, after) in enumerate(zip(self.calls[:last], self.calls[1:], strict=False)):
            cut = _cut(call, parts, hidden)
            # An input that is kept as codes is not needed itself any more once it has been read.
            alike = call.shape == after.shape and call.dtype == after.dtype
            free = hidden if alike and after.fmt != "none" else None
            with gathered(call.module):
                hidden = call.repeated(cut, free)
            self.made[place + 1] = compress(hidden, after.fmt, seed=after.seed)


def _cut(call: Call, parts: Sequence[Tensor], hidden: Tensor | None) -> Callable[[int, int], Tensor]:
    if hidden is None:
        return lambda start, end: call.decoded(parts, start, end)
    return lambda start, end: hidden[:, start:end]


class _Last(NamedTuple):
    """Note of what the last call has returned, which does not keep it."""

    chain: weakref.ref[Chain]
    storage: StorageWeakRef
    place: tuple[object, ...]


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, version_of(tensor)


class Chains:
    """The chains of the layers of a model. A copy of it, or of a model that has it, has none.

    Args:
        every: layers of a chain at most.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._last: _Last | None = None

    def __reduce__(self) -> tuple[type["Chains"], tuple[int]]:
        return Chains, (self.every,)

    def joined(self, call: Call, hidden: Tensor, follows: bool) -> tuple[Chain, Start | None]:
        """The chain of a call, which is its last one now, and what the chain's first call has kept; None where this is
        the first.

        Args:
            follows: whether its layer comes next to another one of this tier.
        """
        last, self._last = self._last, None
        chain = None if last is None else last.chain()
        if last is not None and chain is not None and len(chain.calls) < self.every:
            same = last.storage == StorageWeakRef(hidden.untyped_storage()) and last.place == _place(hidden)
            if same and chain.calls[0].fmt == call.fmt and (start := chain.start()) is not None:
                chain.calls.append(call)
                return chain, start
            if follows:
                say_once(
                    f"a {call.what} that is streamed, with an input for each {self.every} layers, was given another "
                    "tensor than the one that the layer before has returned, so its own input is kept as well. Take "
                    f"away what changes activations between two layers (a hook, a cast), or leave '/{self.every}' out."
                )
        chain = Chain()
        chain.calls.append(call)
        return chain, None

    def returned(self, chain: Chain, output: Tensor) -> None:
        """Note what the last call has returned."""
        if len(chain.calls) < self.every:
            self._last = _Last(weakref.ref(chain), StorageWeakRef(output.untyped_storage()), _place(output))

    def broken(self) -> None:
        """Note that a layer ran which keeps nothing here."""
        self._last = None


class Sharing:
    """Which layers of a stack share inputs.

    Args:
        every: of each layer, how many share one.

    spared: inputs that layers which were asked for so far will not keep.
    """

    def __init__(self, every: Sequence[int]) -> None:
        self.every = every
        self.chains = {n: Chains(n) for n in every}
        self.spared = 0
        self._last, self._length = (-1, ""), 0

    def of(self, index: int, fmt: str) -> tuple[Chains, bool]:
        """The chains of a layer that is streamed, and whether it goes on with one as the layers stand. To be asked in
        the order of the stack.

        Args:
            index: the layer's number.
            fmt: how its input is kept, which is the same in a chain.
        """
        every, (before, form) = self.every[index], self._last
        follows = before == index - 1 and form == fmt and self.every[before] == every and self._length < every
        self._last, self._length = (index, fmt), self._length + 1 if follows else 1
        self.spared += follows
        return self.chains[every], follows
