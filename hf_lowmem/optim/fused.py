"""Steps made by one kernel a parameter, or one for many, in place of decode, update, encode and select.

A method names its kernel (`FUSED`) and gives it its numbers (`fused_settings`). Which parameters take it is decided
here, by what the kernel supports: 8-bit codecs or fp32, contiguous weights and gradients, a GPU with Triton. All others
take the loop of optim/base.py, which is what the kernel's reference is made of, so the results are the same.

Kernels are told of a bad gradient by a flag on the device, so nothing is copied to be undone.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_lowmem.codecs import StateCodec
from hf_lowmem.kernels import Kernel, current_impl
from hf_lowmem.kernels.codecs.reference import CODECS
from hf_lowmem.optim.options import with_rate
from hf_lowmem.optim.state import CORRECTION, count_step

if TYPE_CHECKING:
    from hf_lowmem.optim.base import LowMemOptimizer

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def kernels_run_on(p: Tensor, kernel: Kernel) -> bool:
    """Whether the kernel's Triton is wanted and can run for a contiguous parameter with such a gradient."""
    impl = current_impl()
    if impl == "reference" or (impl == "auto" and p.device.type == "cpu"):
        return False
    grad = p.grad
    return (
        grad is not None
        and grad.layout == torch.strided
        and not hasattr(p, "device_mesh")
        and p.numel() > 0
        and p.dtype in FLOATS
        and grad.dtype in FLOATS
        and p.is_contiguous()
        and grad.is_contiguous()
        and not kernel.unsupported(p)
    )


def can_store(codecs: tuple[StateCodec, StateCodec]) -> bool:
    """Whether the kernels know both codecs."""
    return all(codec.name == "fp32" or codec.name in CODECS for codec in codecs)


def step_fused(optimizer: "LowMemOptimizer", params: list[Tensor], group: dict[str, Any]) -> None:
    """One step of parameters of one group, all of which the optimizer `fuses`: one call for all that are alike."""
    if not params:
        return
    group = with_rate(group)
    kinds: dict[tuple[Any, ...], list[Tensor]] = {}
    for p in params:
        assert p.grad is not None
        names = tuple(codec.name for codec in optimizer.codecs(p, group))
        kinds.setdefault((p.device, p.dtype, p.grad.dtype, names), []).append(p)
    for (*_, names), members in kinds.items():
        _step_alike(optimizer, members, names, group)


def _step_alike(
    optimizer: "LowMemOptimizer", params: list[Tensor], codecs: tuple[str, str], group: dict[str, Any]
) -> None:
    assert optimizer.FUSED is not None
    store = optimizer.store_of(params[0], group)
    moments: dict[str, list[Tensor]] = {}
    corrections: list[Tensor] = []
    seeds: list[int] = []
    state_seeds: list[int] = []
    steps: list[int] = []
    for p in params:
        steps.append(count_step(optimizer.state[p]))
        state = optimizer._state_of(p, group)
        for name in optimizer.state_shapes(p.shape, group):
            moments.setdefault(name, []).extend(state.parts(name, p))
        if store == "bf16_ecc":
            corrections.append(state.tensor(CORRECTION, lambda p=p: torch.zeros_like(p, dtype=torch.int8)))
        if store != "keep":
            seeds.append(optimizer.weight_seed(state))
        if codecs != ("fp32", "fp32"):
            state_seeds.append(state.state_seed)
    used = [codecs[0 if optimizer.STATES[name].signed else 1] for name in moments]
    grads, skipped = [p.grad for p in params], optimizer._skips.on(params[0].device)
    settings = optimizer.fused_settings(group, steps)
    seeds_of = seeds, state_seeds
    optimizer.FUSED(params, grads, skipped, corrections, *moments.values(), *used, store, *seeds_of, *settings)
