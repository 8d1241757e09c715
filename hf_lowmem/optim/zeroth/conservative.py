"""ZO-SGD-Cons: an update that is tried before it is made."""

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from hf_lowmem.optim.options import with_rate
from hf_lowmem.optim.zeroth.estimate import Closure, shifted
from hf_lowmem.optim.zeroth.rules import Mezo

__all__ = ["ZoConservative"]


class ZoConservative(Mezo):
    """MeZO's step forwards, backwards or not at all, whichever has the lowest loss on its own batch (arXiv 2402.11592).

    ```python
    p = min(p, p - lr * u, p + lr * u, key=loss)         # u as in mezo; then decay
    ```

    Three forward passes more than `mezo`. They are made at other weights like all of them: no weight moves to be tried.
    One micro-batch a window, since the trial needs the batch again. Defaults and state as `mezo`'s. Recommended: as
    `mezo`, with the largest batch that fits. Not for you under gradient accumulation, which is refused, or with small
    batches: the lowest loss on the batch of the estimate is a biased judge, and each update costs five passes.
    """

    name = "zo_conservative"
    ACCUMULATES_LOSSES: ClassVar[bool] = False
    _turn: float = 1.0  # of the next update: 1 as estimated, -1 backwards, 0 none

    def probe(self, closure: Closure) -> float:
        """Ask as `mezo` does, then at the weights and at both updates."""
        mean = super().probe(closure)
        assert self._window is not None
        differences = self.differences(self._agreed(self._window))
        turns = (0.0, 1.0, -1.0)
        tried = self._agreed(self._losses(closure, [self._after(turn, differences) for turn in turns]))
        self._turn = min(zip(tried, turns, strict=True), key=lambda pair: pair[0])[1]  # the first of equal ones
        return mean

    def _after(self, turn: float, differences: list[float]) -> Callable[[nn.Parameter], Tensor]:
        """Values of the parameters after an update, but for its rounding in a weight store and its decay."""
        found = {
            id(p): (
                [
                    (-turn * with_rate(group)["lr"] * d / group["perturbation"], seed)
                    for d, seed in zip(differences, self._seeds(slot), strict=True)
                ],
                self._along(slot, group),
            )
            for group, p, slot in self._moving()
        }

        def make(p: nn.Parameter) -> Tensor:
            values = self._values(p)
            return shifted(values, *found[id(p)]) if turn and id(p) in found else values

        return make

    def _update_from(self, differences: list[float]) -> None:
        super()._update_from([self._turn * d for d in differences])
