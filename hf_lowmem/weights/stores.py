"""The ways in which weights are stored, each with what it costs and needs."""

from typing import NamedTuple

import torch

from hf_lowmem.specs import WEIGHT_STORES

__all__ = ["STORES", "Store", "store_for"]


class Store(NamedTuple):
    """One way to store weights.

    Attributes:
        name: what users and kernels call it, one of `specs.WEIGHT_STORES`.
        corrected: whether an int8 is kept beside each weight, which holds its next 8 bits.
        draws: whether writing a weight draws a random number.
    """

    name: str
    corrected: bool = False
    draws: bool = False

    def nbytes(self, values: int) -> int:
        """Bytes that are kept beside `values` weights."""
        return values if self.corrected else 0


STORES = {
    store.name: store
    for store in (Store("keep"), Store("bf16_sr", draws=True), Store("bf16_ecc", corrected=True, draws=True))
}
assert tuple(STORES) == WEIGHT_STORES


def store_for(name: str, dtype: torch.dtype) -> Store:
    """The store of a weight for which `name` was asked: all but "keep" are for bf16, and other weights are kept."""
    return STORES[name if dtype == torch.bfloat16 else "keep"]
