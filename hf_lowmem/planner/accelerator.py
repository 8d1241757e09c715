"""Fake CPU tensors that stand for an accelerator's.

A CPU build of torch cannot make fake CUDA tensors, so every simulated tensor says that it is on the CPU. Where code
looks at the device to choose between implementations with different temporaries, the accelerator's is chosen here. The
whole list:

    torch.optim, clip_grad_norm_     foreach by default, as on CUDA
    TRL's fused head                 Triton kernels that fold a tile in place, and a GEMM that accumulates in fp32
    hf_lowmem.kernels                the Triton implementations, which have no temporaries
    hf_lowmem's references           spans of an accelerator's size
    hf_lowmem.optim                  no waiting: update, then select old or new
    host memory                      meta tensors, which are counted apart
    streamed layers                  flash kernels, which are causal from the lower right, of documents, windows and
                                     shared prompts too

What stays the CPU's: autocast's lists of operators, which are shorter; scaled_dot_product_attention, which keeps the
same as the flash kernel does (query, key, value, output, log-sum-exp); and models that have kernels in packages of
their own, as Mamba's: their plain torch is planned, which takes more.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.optim.optimizer as torch_optimizer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import _disable_current_modes
from transformers.integrations import moe
from transformers.utils import import_utils
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from hf_lowmem.activations.streaming import attention
from hf_lowmem.kernels import Kernel, spans, use_kernels
from hf_lowmem.kernels.codecs.tables import DeviceTable
from hf_lowmem.memory import host
from hf_lowmem.optim import slot
from hf_lowmem.optim.zeroth import offload
from hf_lowmem.planner.four_bit import HAS_BITSANDBYTES, SEEN_THROUGH, parameter_like

__all__ = ["as_on_accelerator", "as_on_cpu", "as_with_real_tensors", "outside_of_modes"]


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _on_the_host(nbytes: int, device: torch.device, field: str) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device="meta")


@contextlib.contextmanager
def as_on_accelerator() -> Iterator[None]:
    """Choose an accelerator's implementations inside the block. For the whole process: not for other threads' work."""
    devices = _foreach_utils._get_foreach_kernels_supported_devices()
    with contextlib.ExitStack() as stack:
        patch = lambda *args: stack.enter_context(mock.patch.object(*args))  # noqa: E731
        for module in (_foreach_utils, torch_optimizer):
            patch(module, "_get_foreach_kernels_supported_devices", lambda: [*devices, "cpu"])
            patch(module, "_foreach_supported_types", [torch.Tensor, torch.nn.Parameter, FakeTensor])
        for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
            patch(chunked_logprob, name, _nothing)
        patch(trl_utils, "_use_triton", lambda device: True)  # scores a copy of the positions that have a label
        patch(spans, "CPU_SPAN_PER_THREAD", spans.ACCELERATOR_SPAN)
        patch(slot, "reads_are_free", lambda device: False)
        patch(host, "buffer_of", _on_the_host)
        patch(attention, "on_accelerator", lambda tensor: True)
        patch(Kernel, "unsupported", lambda self, *args: self.supports(*args))  # as if they were on a GPU with Triton
        stack.enter_context(use_kernels("triton"))
        yield


@contextlib.contextmanager
def as_on_cpu() -> Iterator[None]:
    """See what bitsandbytes' optimizers take for a while on a CPU, where they are made of torch's operators.

    On a GPU a step is one kernel, which takes nothing.
    """
    if not HAS_BITSANDBYTES:
        yield
        return
    steps: Any = torch.ops.bitsandbytes.optimizer_update_32bit, torch.ops.bitsandbytes.optimizer_update_8bit_blockwise
    with mock.patch.dict(SEEN_THROUGH, {step.default: _on_cpu(step.default) for step in steps}):
        yield


def _on_cpu(operator: Any) -> Callable[..., Any]:
    """The function that a CPU runs for an operator."""
    kernel, arguments = torch.library.get_kernel(operator, "CPU"), operator._schema.arguments
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def run(*args: object, **kwargs: object) -> object:
        given = dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
        return kernel.call_boxed(keys, *(given.get(a.name, a.default_value) for a in arguments))

    return run


def outside_of_modes(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, outside of every mode."""

    def run(*args: object, **kwargs: object) -> object:
        with unset_fake_temporarily(), _disable_current_modes():
            return function(*args, **kwargs)

    return run


def _apply(self: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` for fake weights, which cannot be swapped: new parameters take their places."""
    made: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for module in self.modules() if recurse else (self,):
        for name, p in module._parameters.items():
            if p is not None and p.device.type != "meta":  # which is in host memory
                with torch.no_grad():
                    value = fn(p)
                if value is not p:
                    module._parameters[name] = made.setdefault(id(p), parameter_like(p, value))
        module._buffers |= {name: fn(b) for name, b in module._buffers.items() if b is not None}
    return self


def _kept(p: nn.Parameter, device: torch.device) -> nn.Parameter:
    """`hf_lowmem.optim.zeroth.offload.kept` for a fake weight, in the same way."""
    return nn.Parameter(offload.moved(p.detach(), device), p.requires_grad)


@contextlib.contextmanager
def _bitsandbytes_with_real_tensors() -> Iterator[None]:
    if not HAS_BITSANDBYTES:
        yield
        return
    from bitsandbytes import functional
    from bitsandbytes.optim import GlobalOptimManager

    with (
        mock.patch.object(functional, "create_dynamic_map", outside_of_modes(functional.create_dynamic_map)),
        # Where it notes ids of parameters that are to be stepped in fp32: ids of ours are others' afterwards.
        mock.patch.object(GlobalOptimManager, "_instance", None),
    ):
        yield


@contextlib.contextmanager
def as_with_real_tensors() -> Iterator[None]:
    """Let models run and move inside a fake mode as they do with real tensors, and make small tables of real values.

    Tables are computed by numbers that fake tensors do not have, and outlive the simulation.
    """
    with (
        mock.patch.object(nn.Module, "_apply", _apply),
        mock.patch.object(offload, "kept", _kept),
        mock.patch.object(host, "check_host", _nothing),  # of the machine that plans
        mock.patch.object(DeviceTable, "on", outside_of_modes(DeviceTable.on)),
        _bitsandbytes_with_real_tensors(),
        # transformers takes fake tensors for a sign of torch.compile, and builds masks that training does without.
        mock.patch.object(import_utils, "is_fake_tensor", return_value=False),
        # torch's grouped product has a shape rule for bf16 alone; transformers' operator keeps and makes the same.
        mock.patch.object(moe, "_can_use_grouped_mm", lambda x, weight, offsets: weight.dtype is torch.bfloat16),
    ):
        yield
