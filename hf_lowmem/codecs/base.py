"""The contract of a codec: a way to store one optimizer state in fewer bytes than fp32.

A codec turns a tensor into an `Encoded`, a flat dict of plain tensors, and back. Nothing else is ever in the
state of an optimizer, so `torch.load(weights_only=True)` reads every checkpoint, and a report of bytes is a sum
over tensors. A tensor subclass (torchao's way) would hide the same bytes behind dispatch rules that each of
DTensor, `torch.load` and `Optimizer.load_state_dict` must be taught; a dict needs no teaching.

Blocks run over the flattened tensor, so the size of an encoded tensor depends on its number of values alone and
can be predicted by `nbytes` without allocating anything.
"""

from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from hf_lowmem.kernels.codecs.dither import Dither

Encoded = dict[str, Tensor]


@runtime_checkable
class StateCodec(Protocol):
    """Stores one optimizer state.

    ```python
    enc = codec.init(like, signed=True)          # encoded zeros
    codec.encode_(enc, value)                    # value: fp32, shape of `like`; to the nearest
    codec.encode_(enc, value, Dither(seed))      # at random: a state that is an average, with another seed each step
    value = codec.decode(enc, like.shape)        # fp32, a fresh tensor
    ```
    """

    name: ClassVar[str]

    def init(self, like: Tensor, *, signed: bool) -> Encoded:
        """Encoded zeros for a state of `like`'s shape, on its device. `signed=False` promises values >= 0."""
        ...

    def decode(self, enc: Encoded, shape: torch.Size) -> Tensor:
        """The stored values as a fresh contiguous fp32 tensor of `shape`; it never aliases the state."""
        ...

    def encode_(self, enc: Encoded, value: Tensor, dither: Dither | None = None) -> None:
        """Overwrite `enc` in place with `value` (any strides, fp32).

        To the nearest, which is the least error once. With `dither` at random, which is unbiased over many steps: see
        hf_lowmem/kernels/codecs/dither.py.
        """
        ...

    def nbytes(self, numel: int, *, signed: bool) -> int:
        """Bytes that a state of `numel` values takes, scales included: exactly what `init` allocates."""
        ...
