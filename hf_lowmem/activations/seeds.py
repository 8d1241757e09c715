"""Seeds of stochastic rounding: counted and hashed, never drawn.

A seed that is drawn from torch's generator moves every dropout mask after it, so the forward pass would no longer be
HuggingFace's. Here a seed is a hash of four numbers: the seed of the run, the layer, the step of training, and how
often the layer has run in that step. A resumed run that says which step it is at therefore rounds as an uninterrupted
one.
"""

import hashlib

__all__ = ["Seeds"]


class Seeds:
    """The seeds of one layer; called once a forward pass.

    Args:
        base: a number for the whole run.
        layer: the layer's number.
    """

    def __init__(self, base: int, layer: int) -> None:
        self.base, self.layer, self.step, self.calls = base, layer, 0, 0

    def at(self, step: int) -> None:
        """Say at which step of training the next forward passes are."""
        if step != self.step:
            self.step, self.calls = step, 0

    def __call__(self) -> int:
        self.calls += 1
        numbers = f"{self.base} {self.layer} {self.step} {self.calls}".encode()
        return int.from_bytes(hashlib.blake2b(numbers, digest_size=8).digest(), "little") >> 2
