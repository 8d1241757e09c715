"""Steps made by one kernel a parameter, or one for many, in place of decode, update, encode and select.

A method names its kernel and how it gets the method's numbers (`FusedStep`). Which parameters take it is decided here,
by what the kernel supports: 8-bit codecs or fp32, contiguous weights, a GPU with Triton or a CPU with numba. All others
take the loop of optim/stepping.py, which is what the kernel's reference is made of, so the results are the same. It is
many times slower on a GPU, so a warning says once why a parameter takes it there, and what would cure it.

Kernels are told of a bad gradient by a flag on the device, so nothing is copied to be undone.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from hf_lowmem.kernels import Kernel, current_impl
from hf_lowmem.kernels.compare import on
from hf_lowmem.optim.slot import FLOATS, KNOWN, Slot
from hf_lowmem.optim.state import Group, in_dispatch_mode
from hf_lowmem.weights import at_rest

__all__ = ["FusedStep", "call_directly", "is_plain", "kernel_runs", "step_fused", "warn_unfused"]

logger = logging.getLogger(__name__)


class FusedStep(NamedTuple):
    """A kernel for whole steps.

    Args:
        settings: its arguments after tensors, codecs, store and seeds; from the group and each parameter's step. The
            last one is the place of the first value, of a part of a parameter.
    """

    kernel: Kernel
    settings: Callable[[Group, list[int]], tuple[object, ...]]


def kernel_runs(kernel: Kernel, p: Tensor, codecs: Sequence[str] = ()) -> bool:
    """Whether a fast implementation of the kernel is wanted, and can run on the parameter and its gradient.

    On a CPU states that are all fp32 are left to torch's operators, which give torch.optim's bits, unless it is forced.
    """
    impl = current_impl()
    if impl == "reference" or (impl == "auto" and p.device.type == "cpu" and codecs and set(codecs) == {"fp32"}):
        return False
    return not kernel.unsupported(p, p.grad)


def is_plain(p: Tensor) -> bool:
    """Whether a parameter and its gradient are whole and dense, of dtypes that kernels read, the weights contiguous."""
    grad = p.grad
    return (
        grad is not None
        and grad.layout == torch.strided
        and not hasattr(p, "device_mesh")
        and at_rest(p) is None
        and p.numel() > 0
        and p.dtype in FLOATS
        and grad.dtype in FLOATS
        and p.is_contiguous()
    )


def warn_unfused(method: str, p: Tensor, slot: Slot) -> None:
    """Say, once for each reason, why a parameter takes the loop where others of its method have a kernel."""
    if in_dispatch_mode() or not p.numel():  # planned with, not trained; or nothing to step
        return
    unknown = [name for name in slot.codec_names if name not in KNOWN]
    if slot.rest is not None:
        why = "its weights are at rest in int8, which no kernel writes yet", "Take lowmem_weights='bf16_sr' for speed"
    elif slot.sharded:
        why = "its weights are cut by FSDP2", "Use DDP where the weights fit on one device"
    elif unknown:
        why = (
            f"its states are stored as {' and '.join(dict.fromkeys(unknown))}",
            f"Choose of {', '.join(sorted(KNOWN))}, or 8bit",
        )
    elif p.dtype not in FLOATS:
        why = f"its weights are {p.dtype}", "Load the model in bfloat16 or float32"
    elif p.is_contiguous():
        assert p.grad is not None
        why = f"its gradient is {p.grad.dtype}, {p.grad.layout}", "Keep gradients in bfloat16 or float32"
    else:
        why = "its weights are not contiguous", "Set `p.data = p.data.contiguous()` before the optimizer is made"
    _warn(method, *why)


@functools.cache
def _warn(method: str, reason: str, remedy: str) -> None:
    logger.warning(
        "%s: a parameter is stepped by tens of torch operators in place of one kernel, because %s. The result is the "
        "same; the step is several times slower and has fp32 temporaries. %s.",
        method,
        reason,
        remedy,
    )


class _Kind(NamedTuple):
    """All by which one parameter's call differs from another's of the same group."""

    device: torch.device
    dtype: torch.dtype
    grad_dtype: torch.dtype
    codecs: tuple[str, ...]


def step_fused(
    fused: FusedStep,
    entries: Sequence[tuple[Tensor, Slot]],
    group: Group,
    skipped_on: Callable[[torch.device], Tensor],
    norm: Tensor | None = None,
) -> None:
    """One step of parameters of one group, all of which it can fuse: one call for all that are alike.

    Args:
        skipped_on: for a device the number of updates that were left out there; the kernel adds to it.
        norm: of the gradient of the only entry, where it is known.
    """
    kinds: dict[_Kind, list[tuple[Tensor, Slot]]] = {}
    for p, slot in entries:
        assert p.grad is not None
        kinds.setdefault(_Kind(slot.device, p.dtype, p.grad.dtype, slot.codec_names), []).append((p, slot))
    for kind, members in kinds.items():
        _step_alike(fused, members, kind, group, skipped_on(kind.device), norm)


def _step_alike(
    fused: FusedStep,
    members: list[tuple[Tensor, Slot]],
    kind: _Kind,
    group: Group,
    skipped: Tensor,
    norm: Tensor | None,
) -> None:
    """One call for parameters of one kind."""
    params, slots = [p for p, _ in members], [slot for _, slot in members]
    first, store = slots[0], slots[0].store
    for slot in slots:
        slot.count_step()
    moments = [[t for slot in slots for t in slot.tensors(name)] for name in first.states]
    corrections = [slot.correction(p) for p, slot in members] if store.corrected else []
    seeds = [slot.weight_seed for slot in slots] if store.draws else []
    state_seeds = [slot.state_seed for slot in slots] if first.dithers else []
    settings = fused.settings(group, [slot.step for slot in slots])
    stored = *moments, *kind.codecs, store.name
    grads = [p.grad.contiguous() for p in params if p.grad is not None]
    args = params, grads, skipped, corrections, *stored, seeds, state_seeds, *settings, first.first()
    how = fused.settings, kind, store.name, first.dithers
    beside = {} if norm is None else {"norm": norm}
    call_directly(fused.kernel, first.device, how, *args, **beside)
    torch.autograd.graph.increment_version(params)


def call_directly(kernel: Kernel, device: torch.device, kind: tuple[object, ...], *args: object, **beside: Tensor):
    """Call a kernel past its operator where nobody listens to that; what autograd should know is left to the caller.

    Args:
        kind: all by which a call on this device differs from another for Triton.
        beside: what only Triton's function takes, to spare work.
    """
    direct = kernel.directly(device, kind, lambda: _one_of(args))
    if direct is None:
        return kernel(*args)
    with on(device):
        return direct(*args, **beside)


def _one_of(args: tuple[object, ...]) -> tuple[object, ...]:
    """Arguments of the same kind: all that is asked of a list is its first entry."""
    return tuple(cast(list[object], a)[:1] if isinstance(a, list) else a for a in args)
