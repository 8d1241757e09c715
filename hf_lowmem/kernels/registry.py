"""A kernel is two implementations of one function, and the promise that they give the same bits.

The *reference* is plain torch: it is what the mathematics says, what runs on a CPU, and what tests hold the other to.
The *Triton* one makes the same values in one pass over memory. Both hide behind one opaque custom operator
`torch.ops.hf_lowmem.<name>`, so torch.compile, FakeTensorMode, autograd and a profiler meet one name whichever runs.

Why an opaque `custom_op` and not `triton_op`, which lets inductor see the kernel's code: an operator of the latter
kind with a CPU implementation breaks torch.compile on a CPU, and the same model must compile on both.

Which one runs is decided at each call from the tensors' device: Triton where they are on an accelerator that the kernel
supports, else the reference. The environment variable HF_LOWMEM_KERNELS, or `use_kernels`, forces one; a forced Triton
that cannot run is an error that says why, never a silent reference. At its first use on a GPU a kernel is compared with
its reference on one small case, and one that differs or does not compile is not used (proof.py). On a CPU Triton runs
only in its interpreter (TRITON_INTERPRET=1, set before triton is imported): slow, and exactly what tests want.

`triton` is imported inside a kernel's triton.py alone, and that module is imported when it is first needed.
"""

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from hf_lowmem.kernels.choice import IMPLS, VARIABLE, current_impl, use_kernels
from hf_lowmem.kernels.compare import Case, on
from hf_lowmem.kernels.proof import distrusted, is_proved, prove

__all__ = ["IMPLS", "VARIABLE", "Case", "Kernel", "current_impl", "use_kernels"]

_direct: dict[tuple[object, ...], Callable[..., None]] = {}  # what was found for a kind of call


@dataclass(frozen=True)
class Kernel:
    """One function with a reference and a Triton implementation; `kernel(*args)` runs the one that fits.

    Args:
        name: of the operator, torch.ops.hf_lowmem.<name>.
        reference: plain torch, annotated: the operator's schema is read from its signature.
        triton: "package.module:function", same signature; imported when first needed.
        fake: shapes and dtypes of the results without computing them. None where nothing is returned.
        mutates: names of the arguments that are written in place.
        supports: why Triton cannot take these arguments, or "" if it can.
        cases: arguments on which the two are compared.
        parts: of a case, others that launch what it does not; a kernel proves itself on those too.
        bound: how far apart the two may be: from the arguments of a call, the largest |triton - reference| allowed for
            each result and then for each argument that is written in place, as a tensor or a number; 0: the same bits.
            None: the same bits throughout. For kernels that sum, whose order of summation differs; the comment at its
            definition derives it.
    """

    name: str
    reference: Callable[..., Any]
    triton: str
    fake: Callable[..., Any] | None = None
    mutates: tuple[str, ...] = ()
    supports: Callable[..., str] = lambda *args: ""
    cases: Callable[[], Iterable[Case]] = tuple
    parts: Callable[[Case], Iterable[Case]] = lambda case: ()
    bound: Callable[..., Sequence[Tensor | float]] | None = None
    op: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        @functools.wraps(self.reference)
        def run(*args: Any) -> Any:
            chosen = self.pick(*args)
            device = _gpu(args)
            if device is None:
                return chosen(*args)
            with on(device):
                return chosen(*args)

        op = torch.library.custom_op(f"hf_lowmem::{self.name}", run, mutates_args=self.mutates)
        if self.fake is not None:
            op.register_fake(self.fake)
        object.__setattr__(self, "op", op)

    def __call__(self, *args: Any) -> Any:
        """Call the operator. Arguments are positional, as in its schema."""
        return self.op(*args)

    def directly(
        self, device: torch.device, kind: tuple[object, ...], args: Callable[[], tuple[object, ...]]
    ) -> Callable[..., None] | None:
        """Triton's function, where it is what arguments of this kind run and nobody listens to operators; else None.

        An operator that writes to lists of tensors costs more time than what it calls. What it does beside is left to
        the caller: to be on the device, to have no gradients, to tell autograd of what was written.

        Args:
            kind: all by which a call on this device differs from another for Triton.
            args: arguments of the kind, which are asked for at its first call.
        """
        impl = current_impl()
        if impl == "reference" or torch._C._len_torch_dispatch_stack() or torch.compiler.is_compiling():
            return None
        key = self.name, impl, device, kind
        if key in _direct and not distrusted(self.name, device):
            return _direct[key]
        sample = args()
        chosen = self.pick(*sample)
        if chosen.__module__ != self.triton.partition(":")[0]:
            return None
        if device.type != "cuda" or is_proved(self.name, sample, device):  # not in a graph's capture
            _direct[key] = chosen
        return chosen

    def load_triton(self) -> Callable[..., Any]:
        """The Triton implementation. Raises ImportError where triton is not installed."""
        module, _, function = self.triton.partition(":")
        return getattr(import_module(module), function)

    def pick(self, *args: Any) -> Callable[..., Any]:
        """The implementation for these arguments.

        Raises:
            RuntimeError: where Triton is forced and cannot take them; the message says why.
        """
        impl = current_impl()
        if impl == "reference":
            return self.reference
        reason = self.unsupported(*args) or self.unproved(*args)
        if not reason:
            return self.load_triton()
        if impl == "triton":
            raise RuntimeError(f"kernel {self.name!r} is forced to triton, but {reason}. Leave {VARIABLE} unset.")
        return self.reference

    def unsupported(self, *args: Any) -> str:
        """Why Triton does not run on these arguments, or ""."""
        devices = {t.device.type for t in _tensors(args)}
        if devices == {"cpu"} and not (current_impl() == "triton" and os.environ.get("TRITON_INTERPRET") == "1"):
            return "the tensors are on a CPU, where Triton runs in its interpreter only (TRITON_INTERPRET=1)"
        if not devices or not devices <= {"cpu", "cuda"}:
            return f"Triton does not run on {', '.join(sorted(devices)) or 'no tensor'}"
        if not has_triton():
            return "triton is not installed"
        device = _gpu(args)
        return self.supports(*args) or (distrusted(self.name, device) if device is not None else "")

    def unproved(self, *args: Any) -> str:
        """Why Triton has not proved itself on such arguments, or "". At the first use on a GPU this is found out."""
        device = _gpu(args)
        return "" if device is None else prove(self, args, device)


def _tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    """All tensors among the arguments and in lists of them."""
    for arg in args:
        for item in arg if isinstance(arg, list | tuple) else (arg,):
            if isinstance(item, Tensor):
                yield item


def _gpu(args: Iterable[Any]) -> torch.device | None:
    """The GPU of the first tensor that is on one."""
    return next((t.device for t in _tensors(args) if t.device.type == "cuda"), None)


@functools.cache
def has_triton() -> bool:
    """Whether triton is installed; it is not imported."""
    from importlib.util import find_spec

    return find_spec("triton") is not None
