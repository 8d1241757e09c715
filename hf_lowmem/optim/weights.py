"""The weights of one parameter in one update: read in fp32, written back as they are stored, or taken back."""

import torch
from torch import Tensor

from hf_lowmem.distributed import local
from hf_lowmem.kernels.step.reference import load_weight, save_weight
from hf_lowmem.optim.slot import Slot

__all__ = ["Weights"]


class Weights:
    """What an update reads and writes: the one place where stored weights are touched, but for the kernels.

    Args:
        p: the parameter, or a chunk of it.
        slot: its slot.
        finite: whether the gradient is good, on its device. A kernel that writes the weights itself leaves them alone
            where it is not; all other updates are undone.
        keep: whether `undo` may be called, so that `load` must make copies (`before`).
    """

    def __init__(self, p: Tensor, slot: Slot, finite: Tensor, *, keep: bool) -> None:
        self.p, self.slot, self.finite, self.keep = p, slot, finite, keep
        self.here = local(p)
        self.correction = slot.correction(self.here) if slot.store == "bf16_ecc" else None
        self.seed = slot.weight_seed if slot.store != "keep" else None
        self.before: list[tuple[Tensor, Tensor]] = []

    def load(self) -> Tensor:
        """The weights in fp32 (in float64 where they are): the parameter itself where it is stored so."""
        if self.keep:
            stored = [self.here] if self.correction is None else [self.here, self.correction]
            self.before = [(t, t.clone()) for t in stored]
        return self.here if self.here.dtype == torch.float64 else load_weight(self.here, self.correction)

    def save(self, weights: Tensor) -> None:
        """Write what `load` gave and an update has changed."""
        save_weight(self.here, weights, self.correction, self.seed, self.slot.first())

    def undo(self, taken: Tensor) -> None:
        """Write the old weights where `taken`, on the device, is false."""
        for now, old in self.before:
            now.copy_(torch.where(taken, now, old))
