"""The ways in which weights are stored, each with what it costs and needs."""

from typing import NamedTuple

import torch

from hf_lowmem.specs import STORES_AT_REST, WEIGHT_STORES

__all__ = ["STORES", "Store", "store_for"]


class Store(NamedTuple):
    """One way to store weights.

    Attributes:
        name: what users and kernels call it, one of `specs.WEIGHT_STORES` or, at rest, of `specs.STORES_AT_REST`.
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
    for store in (
        Store("keep"),
        Store("bf16_sr", draws=True),
        Store("bf16_ecc", corrected=True, draws=True),
        Store("int8_sr", draws=True),
    )
}
assert tuple(STORES) == (*WEIGHT_STORES, *STORES_AT_REST)


def store_for(name: str, dtype: torch.dtype, *, resting: bool = False) -> Store:
    """The store of a weight for which `name` was asked: all but "keep" are for bf16, and other weights are kept.

    Of a model with weights at rest, the others are stored as "bf16_sr".
    """
    if name in STORES_AT_REST and not resting:
        name = "bf16_sr"
    return STORES[name if dtype == torch.bfloat16 else "keep"]
