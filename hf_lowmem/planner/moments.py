"""A step as a list of moments, and a deep model's from those of shallow ones.

A moment is a stretch of the step in one place (one decoder layer's forward, its backward, what comes before and after
the layers, the optimizer), with the bytes at its highest point. The peak of the step is the highest of its moments.

Depth. Layers of one kind add the same bytes each time, so the bytes at "the last layer's backward" are a linear
function of the depth, and those at the j-th of the inner layers one of j, too. A *peak* is not linear in depth: it may
move from the loss's head to the optimizer as the model grows. Therefore every moment is extrapolated by itself and
the highest is taken afterwards. Two shallow models give each moment's line; a third, deeper one must lie on it to the
byte, and the weights of the whole model, which cost nothing to count, must be predicted to the byte as well. If either
fails, the model is simulated in full.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hf_lowmem.planner.allocations import Live
from hf_lowmem.planner.parts import PARTS, Curve

__all__ = ["KEPT", "ROUNDING", "Moment", "NotLinear", "extrapolate", "highest", "outline"]

# The instant when backward begins: what is alive there beside weights and states is kept for it.
KEPT = "end of forward"

ROUNDING = len(PARTS)  # after the parts, what an allocator's rounding adds

Key = tuple[int, str]


class NotLinear(ValueError):
    """The bytes of a model are no linear function of its depth."""


@dataclass(frozen=True)
class Moment:
    """mark: number of the phase since the start; layer: None outside of the decoder's layers; inside: the module in
    the layer or outside of them; values: (len(PARTS) + 1,) bytes at the highest point, the last of it rounding's."""

    mark: int
    phase: str
    layer: int | None
    inside: str
    before: bool
    values: NDArray[np.int64]

    @property
    def total(self) -> int:
        return int(self.values[:ROUNDING].sum())

    def parts(self) -> dict[str, int]:
        return {name: int(n) for name, n in zip(PARTS, self.values, strict=False) if n}


def outline(curve: Curve, live: Live, start: int, stack: str) -> list[Moment]:
    """The moments of a measured step. `stack`: name of the list of decoder layers."""
    layers: list[int | None] = []
    insides: list[str] = []
    for _, module in curve.names:
        number, _, inside = module.removeprefix(f"{stack}.").partition(".")
        layered = module.startswith(f"{stack}.") and number.isdigit()
        layers.append(int(number) if layered else None)
        insides.append(inside if layered else module)
    total = curve.total
    marks = (
        np.searchsorted(np.array([clock for clock, _ in live.marks]), np.arange(len(total)) + start, side="right") - 1
    )
    layer = np.array([-1 if n is None else n for n in layers])[curve.places]
    edges = np.flatnonzero((np.diff(layer) != 0) | (np.diff(marks) != 0)) + 1
    moments: list[Moment] = []
    seen: set[int] = set()
    for a, b in zip([0, *edges.tolist()], [*edges.tolist(), len(total)], strict=True):
        tick = a + int(np.argmax(total[a:b]))
        mark, here = int(marks[tick]), layers[curve.places[tick]]
        before = here is None and mark not in seen
        if here is not None:
            seen.add(mark)
        phase = live.marks[mark][1]
        if phase == "backward" and not any(moment.mark == mark for moment in moments):
            moments.append(Moment(mark, KEPT, None, "", True, curve.column(a)))
        moments.append(Moment(mark, phase, here, insides[curve.places[tick]], before, curve.column(tick)))
    return moments


def highest(moments: Sequence[Moment]) -> Moment:
    return max(moments, key=lambda moment: moment.total)


def edge_of(period: int) -> int:
    """Number of layers at either end that are matched across depths by their distance from that end.

    One whole period, and the outermost layer, which may be special.
    """
    return period + 1


def _by_key(moments: Sequence[Moment], depth: int, edge: int) -> dict[Key, Moment]:
    """The highest moment of each kind: layers by their distance from the nearer end, those between as one kind."""
    found: dict[Key, Moment] = {}
    for moment in moments:
        if moment.phase == KEPT:
            label = KEPT
        elif moment.layer is None:
            label = "before" if moment.before else "after"
        elif moment.layer < edge:
            label = f"first {moment.layer}"
        elif moment.layer >= depth - edge:
            label = f"last {depth - 1 - moment.layer}"
        else:
            label = "inner"
        key = (moment.mark, label)
        if key not in found or moment.total > found[key].total:
            found[key] = moment
    return found


def extrapolate(measured: dict[int, list[Moment]], depth: int, period: int = 1) -> list[Moment]:
    """The moments at `depth` from those at three smaller depths, equally far from each other.

    period: after how many layers their kinds repeat.

    Raises:
        NotLinear: where the third does not lie on the line through the other two, in any part of any moment.
    """
    low, middle, high = sorted(measured)
    edge = edge_of(period)
    kinds = {d: _by_key(measured[d], d, edge) for d in measured}
    if not kinds[low].keys() == kinds[middle].keys() == kinds[high].keys():
        raise NotLinear("the step does other things in a deeper model")
    steps, rest = divmod(depth - low, middle - low)
    if rest:
        raise NotLinear(f"{depth} layers are no whole number of periods above {low}")
    made: dict[Key, Moment] = {}
    for key, first in kinds[low].items():
        slope = kinds[middle][key].values - first.values
        if not np.array_equal(first.values + 2 * slope, kinds[high][key].values):
            raise NotLinear(f"in {first.phase}, {key[1]}: bytes grow unevenly with depth")
        layer = first.layer if first.layer is None or key[1].startswith("first") else depth - low + first.layer
        made[key] = replace(first, layer=layer, values=first.values + steps * slope)
    between: dict[tuple[int, int | None], Moment] = {
        (m.mark, m.layer): m  # the highest, of passes that take turns in a layer
        for m in sorted(measured[high], key=lambda m: m.total)
        if m.layer is not None and edge <= m.layer < high - edge
    }
    for moment in _filled(kinds[high], period):
        real = between.get((moment.mark, moment.layer))
        if real is not None and not np.array_equal(real.values, moment.values):
            raise NotLinear(f"in {real.phase}, layer {real.layer}: bytes grow unevenly from layer to layer")
    return _filled(made, period)


def _filled(made: dict[Key, Moment], period: int) -> list[Moment]:
    """All moments in the order of the step. Inner layers are added one by one, as bytes are linear in their number."""
    ordered: list[Moment] = []
    for mark in sorted({mark for mark, _ in made}):
        here = {label: moment for (m, label), moment in made.items() if m == mark}
        layers = {m.layer: m for label, m in here.items() if m.layer is not None and label != "inner"}
        firsts = sorted(n for n in layers if n <= period)[-period:]
        lasts = sorted(n for n in layers if n > period)
        for low in firsts:
            high = next((n for n in lasts if (n - low) % period == 0), None)
            if high is None:  # a phase that touches a few layers only
                continue
            rise = layers[high].values - layers[low].values
            for number in range(low + period, high, period):
                values = layers[low].values + rise * (number - low) // (high - low)
                layers[number] = replace(layers[low], layer=number, values=values)
        down = any(moment.phase == "backward" for moment in layers.values())
        ordered += [here[label] for label in (KEPT, "before") if label in here]
        ordered += [layers[number] for number in sorted(layers, reverse=down)]
        ordered += [here["after"]] if "after" in here else []
    return ordered
