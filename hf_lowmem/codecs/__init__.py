"""How an optimizer state is stored. The contract is in base.py, what the block codecs share in blocks.py.

| name         | bytes a value | blocks of | worth it for                                          |
|--------------|---------------|-----------|-------------------------------------------------------|
| `fp32`       | 4             | -         | a reference                                           |
| `bf16`       | 2             | -         | a first moment                                        |
| `int8`       | 1.016         | 256       | a first moment                                        |
| `fp8`        | 1.031         | 128       | a baseline                                            |
| `fp8_expand` | 1.023         | 128       | a second moment: bounded relative error at any range   |
"""

from hf_lowmem.codecs.base import Encoded, StateCodec
from hf_lowmem.codecs.blocks import BlockCodec, ErrorBound, is_signed
from hf_lowmem.codecs.fp8 import Fp8Codec
from hf_lowmem.codecs.fp8_expand import Fp8ExpandCodec
from hf_lowmem.codecs.full import Bf16Codec, Fp32Codec
from hf_lowmem.codecs.int8 import Int8Codec
from hf_lowmem.specs import check_choice

__all__ = [
    "CODECS",
    "Bf16Codec",
    "BlockCodec",
    "Encoded",
    "ErrorBound",
    "Fp8Codec",
    "Fp8ExpandCodec",
    "Fp32Codec",
    "Int8Codec",
    "StateCodec",
    "get_codec",
    "is_signed",
]

_ALL: tuple[StateCodec, ...] = (Fp32Codec(), Bf16Codec(), Int8Codec(), Fp8Codec(), Fp8ExpandCodec())
CODECS: dict[str, StateCodec] = {codec.name: codec for codec in _ALL}


def get_codec(name: str) -> StateCodec:
    """The codec called `name`. Raises ValueError, with the nearest names first, if there is none."""
    check_choice("codec", name, CODECS)
    return CODECS[name]
