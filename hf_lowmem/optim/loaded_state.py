"""Whether a loaded state can be continued: everything there, nothing else, finite, and of the right kind.

A moment that is missing would begin at zero under the old step count, and the next update would be tens of learning
rates long. A NaN in a moment is in the weight after one step, for good. So a state is read to the last value before it
is taken over, in parts, as decoding a long one whole would take four bytes a value.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_lowmem.codecs import BlockCodec, StateCodec
from hf_lowmem.codecs.rows import RowCodec
from hf_lowmem.distributed import local
from hf_lowmem.kernels.codecs.blocks import code_bytes
from hf_lowmem.optim.accumulator import empty, is_open
from hf_lowmem.optim.chunked import CHUNK
from hf_lowmem.optim.slot import Slot
from hf_lowmem.optim.state import CORRECTION, COUNTS, WINDOW, Group, State, encoded_in, number

__all__ = ["check_counts", "check_keys", "check_values"]

REMEDY = "Take a checkpoint that is whole, or start with a fresh optimizer."
AS_SAVED = "as it was when it was saved, or start with a fresh optimizer"


def check_counts(label: str, raw: dict[str, Any], method: str) -> None:
    """Raise unless the whole numbers of a state are whole numbers, the step at least 1.

    Raises:
        ValueError: naming the parameter, the value and the remedy.
    """
    for name in COUNTS:
        # Within a window a state may be older than the first update.
        value = raw.get(name, None if name == "step" and not _in_window(raw) else 1)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if isinstance(value, Tensor) and value.numel() == 1:
            whole = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
        if not whole:
            raise ValueError(
                f"the checkpoint's state of {label} has {name}={value!r}, expected an integer: it was not saved by "
                f"hf_lowmem's {method}. Start with a fresh optimizer."
            )
        least = 1 if name == "step" else 0
        if not least <= number(value) < 2**63:
            raise ValueError(
                f"the checkpoint's state of {label} has {name}={number(value)}, expected at least {least} and below "
                f"2**63: no update leaves such a state. {REMEDY}"
            )


def check_keys(slot: Slot, group: Group, label: str, raw: dict[str, Any], states: Mapping[str, State]) -> None:
    """Raise where a tensor of a state is missing, unknown, or of another dtype or shape than it must have.

    Args:
        states: those that the parameter must have, in the checkpoint's layout.
    """
    expected: dict[str, Tensor] = {}
    passing: dict[str, Tensor] = {}
    for name, state in states.items():
        (passing if state.decl.passing else expected).update(state.empty(name, "meta"))
    if slot.store.corrected:
        expected[CORRECTION] = torch.empty(slot.shape, dtype=torch.int8, device="meta")
    if "step" not in raw:
        passing, expected = expected | passing, {}
    if is_open(raw):
        expected |= _sum_of(slot, label)
    found = {k: v for k, v in raw.items() if k not in COUNTS}
    for key in expected.keys() - found.keys():
        raise ValueError(
            f"the checkpoint's state of {label} has no {key!r}: it would begin at zero under a step count of "
            f"{number(raw.get('step', 0))}. {REMEDY}"
        )
    expected |= passing
    for key, value in found.items():
        if key not in expected:
            raise ValueError(
                f"the checkpoint's state of {label} has {key!r}, which {group['method']} with "
                f"state={group['state']!r} does not keep. Build the optimizer {AS_SAVED}."
            )
        dtype, shape = expected[key].dtype, expected[key].shape
        if not isinstance(value, Tensor) or value.dtype != dtype:
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"the checkpoint's state of {label} has {key!r} in {kind}, expected {dtype}: something has converted "
                f"it, and its values have changed. {REMEDY}"
            )
        if value.shape != shape:
            raise ValueError(
                f"the checkpoint's state of {label} has {key!r} of shape {tuple(value.shape)}, expected "
                f"{tuple(shape)}. Build the model {AS_SAVED}."
            )


def _in_window(raw: Mapping[str, object]) -> bool:
    return WINDOW in raw or is_open(raw)


def _sum_of(slot: Slot, label: str) -> dict[str, Tensor]:
    if slot.sharded:
        raise ValueError(
            f"the checkpoint was saved in the middle of a gradient accumulation: its state of {label} holds a sum in "
            "int8, which cannot be put into shards. Continue it in one process to the next step, or save after a step."
        )
    return empty(slot.values, "meta")


def check_values(label: str, raw: dict[str, Any], states: Mapping[str, State]) -> None:
    """Raise where a state holds a NaN or an Inf, or a negative value where none can be."""
    for name, state in states.items():
        encoded = {k: local(v) for k, v in encoded_in(raw, name).items()}
        for part in _parts(state.codec, encoded) if encoded else ():
            _check(label, name, part, state.decl.signed)


def _check(label: str, name: str, values: Tensor, signed: bool) -> None:
    if not values.numel():
        return
    low, high = (float(x) for x in torch.aminmax(values))
    if not (low > -torch.inf and high < torch.inf):  # also of NaN
        raise ValueError(f"the checkpoint's state of {label} has a NaN or Inf in {name!r}. {REMEDY}")
    if low < 0 and not signed:
        raise ValueError(
            f"the checkpoint's state of {label} has a negative value ({low:g}) in {name!r}, which is a mean of "
            f"squares or a norm. {REMEDY}"
        )


def _parts(codec: StateCodec, encoded: dict[str, Tensor]) -> Iterator[Tensor]:
    """The values of an encoded state, decoded some at a time."""
    if "data" in encoded:
        yield encoded["data"]
        return
    scalars = {k: v for k, v in encoded.items() if k != "codes"}
    yield from (v for v in scalars.values() if v.is_floating_point())
    codes = encoded["codes"]
    if isinstance(codec, RowCodec):
        step = max(1, CHUNK // max(codec.length, 1))
        for start in range(0, codes.shape[0], step):
            part = {k: v[start : start + step] for k, v in encoded.items()}
            yield codec.decode(part, torch.Size([part["codes"].shape[0], codec.length]))
        return
    assert isinstance(codec, BlockCodec)
    size, flat = CHUNK - CHUNK % codec.block, codes.view(-1)
    count = flat.numel() * 8 // codec.bits
    for start in range(0, count, size):
        stop = min(start + size, count)
        part = {k: v[start // codec.block : -(-stop // codec.block)] for k, v in scalars.items()}
        part["codes"] = flat[code_bytes(start, codec.bits) : code_bytes(stop, codec.bits)]
        yield codec.decode(part, torch.Size([stop - start]))
