"""Codecs: formats of an optimizer state. base.py has their contract, blocks.py what those with blocks share.

| name            | bytes a value | blocks of | worth it for                                                     |
|-----------------|---------------|-----------|------------------------------------------------------------------|
| `fp32`          | 4             | -         | a reference                                                      |
| `bf16`          | 2             | -         | a first moment                                                   |
| `int8`          | 1.016         | 256       | a first moment, at the fewest bytes                              |
| `int8_softsign` | 1.031, 1.0625 | 64        | a first moment: the smallest error of the update in 8 bits       |
| `fp8`           | 1.031         | 128       | a baseline                                                       |
| `fp8_expand`    | 1.039         | 128       | a second moment: bounded relative error at any range             |
| `int4`          | 0.531, 0.5625 | 128       | half of 8 bits, for more than ten times the error                |

Where there are two numbers, the second one is that of an unsigned state, whose scales are fp32.

A second moment has other needs than a first one, so a setting may be a pair: `codec_pair`. Optimizers round what is an
average at random: hf_lowmem/kernels/codecs/dither.py.
"""

# A user's value may be of any type, whatever the annotation says: it is looked at.
# pyright: reportUnnecessaryIsInstance=false

from hf_lowmem.codecs.base import Encoded, StateCodec
from hf_lowmem.codecs.blocks import BlockCodec, ErrorBound, KernelCodec, is_signed
from hf_lowmem.codecs.fp8 import Fp8Codec
from hf_lowmem.codecs.fp8_expand import Fp8ExpandCodec
from hf_lowmem.codecs.full import Bf16Codec, Fp32Codec
from hf_lowmem.codecs.int4 import Int4Codec
from hf_lowmem.codecs.int8 import Int8Codec
from hf_lowmem.codecs.softsign import SoftsignCodec
from hf_lowmem.kernels.codecs.dither import Dither
from hf_lowmem.specs import check_choice

__all__ = [
    "CODECS",
    "PAIRS",
    "Bf16Codec",
    "BlockCodec",
    "Dither",
    "Encoded",
    "ErrorBound",
    "Fp8Codec",
    "Fp8ExpandCodec",
    "Fp32Codec",
    "Int4Codec",
    "Int8Codec",
    "KernelCodec",
    "SoftsignCodec",
    "StateCodec",
    "codec_pair",
    "is_signed",
]

_ALL: tuple[StateCodec, ...] = (
    Fp32Codec(),
    Bf16Codec(),
    Int8Codec(),
    SoftsignCodec(),
    Fp8Codec(),
    Fp8ExpandCodec(),
    Int4Codec(),
)
CODECS: dict[str, StateCodec] = {codec.name: codec for codec in _ALL}

# Names of pairs: the codec of signed states (a first moment), the codec of unsigned ones (a second moment).
# "8bit" is chosen by scripts/bench/codecs.py: the first moment with the least error of the update in 8 bits, and the
# second moment whose worst error is the smallest. (int8_softsign for both has a mean error that is up to a fifth lower,
# but a value far below its block's largest is raised, and its update lost.)
PAIRS: dict[str, tuple[str, str]] = {"8bit": ("int8_softsign", "fp8_expand")}


def codec_pair(name: str, *, label: str = "state") -> tuple[StateCodec, StateCodec]:
    """The codec of signed states and the codec of unsigned ones.

    ```python
    codec_pair("int8")               # one codec for both
    codec_pair("int8,fp8_expand")    # first moment, second moment
    codec_pair("8bit")               # a name of PAIRS
    ```

    Args:
        name: a name of `CODECS` or `PAIRS`, or two names of `CODECS` with a comma between them.
        label: what the user calls the argument, for the errors.

    Raises:
        TypeError: where `name` is no string.
        ValueError: for an unknown name (the nearest ones first), an empty one, or more than two.
    """
    if not isinstance(name, str) or "," not in name:
        check_choice(label, name, [*CODECS, *PAIRS])
        signed, unsigned = PAIRS.get(name, (name, name))
        return CODECS[signed], CODECS[unsigned]
    parts = [part.strip() for part in name.split(",")]
    if len(parts) != 2 or not all(parts):
        what = "has an empty name" if len(parts) == 2 else f"has {len(parts)} names"
        raise ValueError(
            f"{label}={name!r} {what}: expected one codec, or two with a comma between them, that of the signed states "
            "(first moment) and that of the unsigned ones (second moment), such as 'int8,fp8_expand'."
        )
    for place, part in zip(("first", "second"), parts, strict=True):
        if part in PAIRS:
            raise ValueError(
                f"{label}={name!r}: {part!r} is a pair itself ({','.join(PAIRS[part])}) and cannot be one half of "
                f"another. Write {label}={part!r}, or name two codecs: {', '.join(CODECS)}."
            )
        check_choice(f"{label}={name!r}: {place} codec", part, CODECS)
    return CODECS[parts[0]], CODECS[parts[1]]
