"""Weight stores: what is kept of a weight between two steps, and how an update is written into it.

A bf16 weight has 8 significant bits. An update below a 512th of it rounds to nothing, which at the learning rates of
fine-tuning is most of them. The usual cure is an fp32 copy of every weight, 4 bytes more. Here are two cheaper ones; in
both the model's own weights are plain bf16, so saving, inference and other tools see nothing.

`keep` rounds to nearest, in whatever dtype the weights are. `bf16_sr` keeps nothing more: a weight is rounded up or
down at random, with the probabilities that make the expectation exact. `bf16_ecc` keeps 8 bits more of the weight as an
int8, its correction: 24 bits in all, for 3 bytes.

`int8_sr` goes the other way: 1.03 bytes a weight and no bf16 at all, but for the moment in which a layer multiplies by
it (rest.py, forwards.py). That is a matter of the model, not of the optimizer alone: model.py.

Both work on the bits as integers. The bits of a float, without its sign, have the order of its magnitude, so a bf16 is
the upper half of an fp32 and "the remainder" is a difference of integers, exact in every binade and at its borders. The
remainder as a float (a fraction of half a unit in the last place) would need the unit's size, which changes there.
"""

from hf_lowmem.kernels.codecs.weights import join_24, round_stochastic, split_24
from hf_lowmem.weights.frozen import FrozenCodes
from hf_lowmem.weights.model import (
    SIDE_FILE,
    expect_scales,
    leave,
    put_to_rest,
    resting,
    save_adapter_alone,
    wake,
    write_scales,
)
from hf_lowmem.weights.rest import AtRest, at_rest
from hf_lowmem.weights.stores import STORES, Store, store_for
from hf_lowmem.weights.weights import Weights

__all__ = [
    "SIDE_FILE",
    "STORES",
    "AtRest",
    "FrozenCodes",
    "Store",
    "Weights",
    "at_rest",
    "expect_scales",
    "join_24",
    "leave",
    "put_to_rest",
    "resting",
    "round_stochastic",
    "save_adapter_alone",
    "split_24",
    "store_for",
    "wake",
    "write_scales",
]
