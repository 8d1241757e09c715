"""Counting tensors by the storages behind them: parameters, gradients, optimizer state.

Not by `numel() * element_size()`: that counts tied weights and views twice, a slice for less than it keeps alive, and a
quantised tensor for what it pretends to be.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = [
    "gradient_bytes",
    "human_bytes",
    "optimizer_bytes",
    "parameter_bytes",
    "storages",
    "tensors_in",
    "total_bytes",
]


def human_bytes(n: int | float) -> str:
    """`n` bytes in binary units, two decimals from 1 KiB on: `human_bytes(1536) == "1.50 KiB"`."""
    sign, value = "-" if n < 0 else "", abs(n)
    if value < 1024:
        return f"{sign}{value:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        value /= 1024
        if round(value, 2) < 1024 or unit == "TiB":
            break
    return f"{sign}{value:.2f} {unit}"


def storages(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """(key, bytes) of each storage behind `tensor`; the key is unique among the storages alive.

    Wrapper subclasses (DTensor, torchao's quantised tensors, jagged tensors) are what they hold: for a
    DTensor, the local shard. A weight at rest in int8 is its codes and scales. Fake and meta tensors have a storage
    that weighs what the real one would."""
    if is_traceable_wrapper_subclass(tensor):
        inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    elif (kept := getattr(tensor, "lowmem_at_rest", None)) is not None:
        storage = tensor.untyped_storage()  # of one value
        yield storage._cdata, storage.nbytes()
        inner = list(kept.stored())
    elif tensor.layout is torch.strided:
        try:
            storage = tensor.untyped_storage()
            yield storage._cdata, storage.nbytes()
        except (NotImplementedError, RuntimeError):  # a wrapper subclass that tells nothing of its inside
            yield id(tensor), tensor.numel() * tensor.element_size()
        return
    elif tensor.layout is torch.sparse_coo:
        inner = [tensor._indices(), tensor._values()]
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        inner = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        inner = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    else:  # opaque, e.g. mkldnn
        yield id(tensor), tensor.numel() * tensor.element_size()
        return
    for part in inner:
        if isinstance(part, Tensor):
            yield from storages(part)


def total_bytes(tensors: Iterable[Tensor], but: Iterable[Tensor] = ()) -> int:
    skip = {key for t in but for key, _ in storages(t)}
    nbytes = dict(pair for t in tensors for pair in storages(t))
    return sum(n for key, n in nbytes.items() if key not in skip)


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Tensors in nested containers and in plain objects' attributes: GaLore's projector is such an object."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in seen and not isinstance(value, str | bytes | type | nn.Module):
        seen.add(id(value))
        if isinstance(value, dict):
            inner = value.values()
        elif isinstance(value, list | tuple | set | frozenset | deque):
            inner = value
        else:
            inner = getattr(value, "__dict__", {}).values()
        for item in list(inner):
            yield from tensors_in(item, seen)


def _parameters(model: nn.Module | Iterable[Tensor]) -> Iterable[Tensor]:
    return model.parameters() if isinstance(model, nn.Module) else model


def parameter_bytes(model: nn.Module | Iterable[Tensor], *, trainable: bool = False) -> int:
    """Bytes of the parameters, tied ones once; with `trainable=True` of those that require a gradient.

    Buffers do not count, nor does what a quantised layer keeps beside its weight (bitsandbytes'
    `quant_state`)."""
    return total_bytes(p for p in _parameters(model) if p.requires_grad or not trainable)


def gradient_bytes(model: nn.Module | Iterable[Tensor]) -> int:
    """Bytes of the `.grad` of a model's (or the given) parameters. DDP's gradients are views of its buckets:
    the buckets count, once. Zero after `zero_grad()`, and zero for parameters stepped during the backward
    pass."""
    return total_bytes(p.grad for p in _parameters(model) if p.grad is not None)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in `optimizer.state`, on whatever device they are, but of no parameter itself.

    AdamW over fp32 parameters keeps 8 bytes per value and 4 per parameter tensor (`step`, an fp32 scalar).
    Any torch optimizer, and wrappers that forward `.state` and `.param_groups` such as accelerate's. Zero
    before the first step of an optimizer that creates its state lazily, as nearly all do."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return total_bytes(tensors_in(list(optimizer.state.values())), but=parameters)
