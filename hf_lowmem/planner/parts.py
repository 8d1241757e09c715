"""Parts of a step's memory, from a log of storages: the peak, what it consists of, when, and where.

A storage belongs to one part, the first that fits:

    reference     weights of a reference model
    weights       parameters and buffers, frozen and trained
    states        held by the optimizer
    gradients     handed to a parameter, whether or not it kept them
    inputs        the batch
    logits        floating-point, outside of the layers, as wide as the vocabulary or as a tile of TRL's fused head
    activations   made in the forward pass and alive when backward begins; or made by a layer that runs again in
                  backward, and alive when that has ended
    temporaries   everything else
    communication buckets, gathered layers: see parallel.py
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_lowmem.planner.step import Measured

# The unit of a caching allocator: torch's on CUDA rounds every block up to it.
BLOCK = 512
# The columns of a tile of TRL's fused head, a private constant there; tests/house/test_hosts.py compares the two.
HEAD_TILE = 32768

__all__ = ["PARTS", "Curve", "curve_of"]

PARTS = (
    "weights",
    "reference",
    "states",
    "gradients",
    "inputs",
    "logits",
    "activations",
    "temporaries",
    "communication",
)


@dataclass
class Curve:
    """Bytes alive at each tick of the log's clock, from the first step's beginning to the last one's end.

    parts:   (len(PARTS), ticks) int64
    places:  what was being done at each tick: (phase, module), as an index
    names:   of the places
    rounding: (ticks,) bytes that blocks of whole multiples of BLOCK take beside
    """

    parts: NDArray[np.int64]
    rounding: NDArray[np.int64]
    places: NDArray[np.int64]
    names: list[tuple[str, str]]

    @property
    def total(self) -> NDArray[np.int64]:
        return self.parts.sum(0)

    def peak(self) -> int:
        """The tick at which most is alive, the last of equals."""
        total = self.total
        return int(len(total) - 1 - np.argmax(total[::-1]))

    def column(self, tick: int) -> NDArray[np.int64]:
        """The bytes of every part at `tick`, and after them what rounding adds."""
        return np.append(self.parts[:, tick], self.rounding[tick])


def _parts_of(measured: Measured) -> NDArray[np.int64]:
    """Index in PARTS of every row."""
    live = measured.live
    rows = len(live.births)
    births, deaths = np.array(live.births), np.array(live.deaths)
    deaths = np.where(deaths < 0, np.iinfo(np.int64).max, deaths)
    owners = np.array(live.owners)
    phase = np.array([name for name, _ in live.places])[owners]
    outside = np.array([not module.startswith(f"{measured.stack}.") for _, module in live.places])[owners]
    part = np.full(rows, PARTS.index("temporaries"))
    ends = np.array([clock for clock, name in live.marks if name == "backward"] + [np.iinfo(np.int64).max])
    backward_begins = ends[np.searchsorted(ends, births)]  # the first after each birth
    part[(phase == "forward") & (deaths > backward_begins)] = PARTS.index("activations")
    for began, ended in live.recomputed:
        part[(births > began) & (births <= ended) & (deaths > ended)] = PARTS.index("activations")
    part[outside & np.isin(live.widths, (measured.vocabulary, HEAD_TILE))] = PARTS.index("logits")
    for name in ("inputs", "gradients", "states", "weights", "reference"):
        part[list(getattr(measured, name))] = PARTS.index(name)
    return part


def curve_of(measured: Measured) -> Curve:
    """The bytes of every part over the steps."""
    live = measured.live
    ticks = live.clock + 1
    changes = np.zeros((len(PARTS), ticks), dtype=np.int64)
    part = _parts_of(measured)
    sizes, births, deaths = np.array(live.sizes), np.array(live.births), np.array(live.deaths)
    np.add.at(changes, (part, births), sizes)
    died = deaths >= 0
    np.add.at(changes, (part[died], deaths[died]), -sizes[died])
    padding = -sizes % BLOCK
    added = np.zeros(ticks, dtype=np.int64)
    np.add.at(added, births, padding)
    np.add.at(added, deaths[died], -padding[died])
    window = slice(measured.start, measured.end + 1)
    parts, rounding = changes.cumsum(1)[:, window], added.cumsum()[window]
    places = np.zeros(ticks, dtype=np.int64)
    # A place is known where something is born in it, and holds until the next birth.
    places[births] = live.owners
    born = np.zeros(ticks, dtype=np.int64)
    born[births] = births
    return Curve(parts, rounding, places[np.maximum.accumulate(born)][window], live.places)
