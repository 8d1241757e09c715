"""Updates that are alike, logged once: a deep model has hundreds, and each is a hundred operators.

The second step of a plan finds all states in their places. An update then leaves no storage behind and frees none that
was there before, so it is a sequence of births and deaths, which is the same for every parameter of one shape under one
rule. The first is run and its sequence kept; for the others it is written into the log again, event by event.
"""

from collections.abc import Callable, Hashable

from torch import Tensor

from hf_lowmem.optim.guard import SkipCount
from hf_lowmem.optim.method import Method
from hf_lowmem.optim.slot import Slot
from hf_lowmem.optim.state import Group
from hf_lowmem.planner.allocations import Live

__all__ = ["logged_once"]

Step = Callable[[Method, Tensor, Slot, Group, SkipCount, Tensor | None], None]


def logged_once(step: Step, live: Live) -> Step:
    """A step of one parameter (`hf_lowmem.optim.stepping.step_by_loop`), run once for all that are alike."""
    seen: dict[Hashable, list[tuple[int, int, int]]] = {}

    def run(method: Method, p: Tensor, slot: Slot, group: Group, skips: SkipCount, finite: Tensor | None) -> None:
        key = _kind(method, p, slot, finite)
        if key in seen:
            live.repeat(seen[key])
            return
        first, began = len(live.births), live.clock
        settled = bool(slot.raw)  # before its first update a state is not there yet
        step(method, p, slot, group, skips, finite)
        if settled and (events := live.events(first, began)) is not None:
            seen[key] = events

    return run


def _kind(method: Method, p: Tensor, slot: Slot, finite: Tensor | None) -> Hashable:
    """All of a parameter, its gradient and its state on which the storages of an update depend."""
    assert p.grad is not None
    state = tuple((name, _layout(v)) for name, v in slot.raw.items())
    of_slot = id(slot.group), slot.rule, slot.reach, slot.codec_names, slot.rest is not None
    return id(method), type(p), _layout(p), _layout(p.grad), state, of_slot, finite is None


def _layout(value: object) -> Hashable:
    return (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else type(value)
