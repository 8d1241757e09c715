"""The weights of one parameter in one update: read in fp32, written back as they are stored, or taken back."""

import torch
from torch import Tensor

from hf_lowmem.distributed import local
from hf_lowmem.kernels.step.reference import load_weight, save_weight
from hf_lowmem.weights.rest import AtRest

__all__ = ["Weights"]


class Weights:
    """Access of an update to stored weights: everything but a kernel reads and writes them here.

    Args:
        p: the parameter, or a chunk of it.
        finite: whether the gradient is good, on its device. A kernel that writes the weights itself leaves them alone
            where it is not; all other updates are undone.
        keep: whether `undo` may be called, so that `load` must make copies (`before`).
        correction: the next 8 bits of each weight, where its store keeps them.
        seed: of the random rounding, where its store rounds so.
        first: place in the whole parameter of the first value that is here, which decides what it draws.
        rest: what is kept of a weight that is at rest.
    """

    def __init__(
        self,
        p: Tensor,
        finite: Tensor,
        *,
        keep: bool,
        correction: Tensor | None = None,
        seed: int | None = None,
        first: int = 0,
        rest: AtRest | None = None,
    ) -> None:
        self.p, self.finite, self.keep = p, finite, keep
        self.here = local(p) if rest is None else rest.scale  # what is not finite where an update was not
        self.correction, self.seed, self.first, self.rest = correction, seed, first, rest
        self.before: list[tuple[Tensor, Tensor]] = []

    def load(self) -> Tensor:
        """The weights in fp32 (in float64 where they are): the parameter itself where it is stored so."""
        if self.keep:
            stored = [self.here] if self.correction is None else [self.here, self.correction]
            self.before = [(t, t.clone()) for t in (stored if self.rest is None else self.rest.stored())]
        if self.rest is not None:
            return self.rest.load()
        return self.here if self.here.dtype == torch.float64 else load_weight(self.here, self.correction)

    def save(self, weights: Tensor) -> None:
        """Write what `load` gave and an update has changed."""
        if self.rest is not None:
            self.rest.save(weights, self.seed, self.first)
            return
        save_weight(self.here, weights, self.correction, self.seed, self.first)

    def undo(self, taken: Tensor) -> None:
        """Write the old weights where `taken`, on the device, is false."""
        for now, old in self.before:
            now.copy_(torch.where(taken, now, old))
