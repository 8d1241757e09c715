"""A kernel is up to three implementations of one function, and the promise that they give the same bits.

The *reference* is plain torch: it is what the mathematics says, what runs where nothing else does, and what tests hold
the others to. The *Triton* one makes the same values in one pass over memory on a GPU, the *cpu* one, which a compiler
for Python makes (numba: kernels/_cpu.py), in one pass on a CPU; not every kernel has it. All hide behind one opaque
custom operator `torch.ops.hf_lowmem.<name>`, so torch.compile, FakeTensorMode, autograd and a profiler meet one name
whichever runs.

Why an opaque `custom_op` and not `triton_op`, which lets inductor see the kernel's code: an operator of the latter
kind with a CPU implementation breaks torch.compile on a CPU, and the same model must compile on both.

Which one runs is decided at each call from the tensors' device: Triton where they are on an accelerator that the kernel
supports, cpu where they are on a CPU and numba is installed, else the reference. The environment variable
HF_LOWMEM_KERNELS, or `use_kernels`, forces one; a forced one that cannot run is an error that says why, never a silent
reference. At its first use on a device a kernel is compared with its reference on one small case, and one that differs
or does not compile is not used (proof.py). On a CPU Triton runs only in its interpreter (TRITON_INTERPRET=1, set before
triton is imported): slow, and exactly what tests want.

`triton` is imported inside a kernel's triton.py alone, `numba` inside its cpu.py, and these modules when they are first
needed.
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
from hf_lowmem.kernels.compare import CPU, Case, Implementation, on
from hf_lowmem.kernels.proof import distrusted, is_proved, prove

__all__ = ["IMPLS", "VARIABLE", "Case", "Kernel", "current_impl", "use_kernels"]

INSTALL = "pip install 'hf-lowmem[cpu]'"  # of what compiles a CPU's kernels
_direct: dict[tuple[object, ...], Implementation] = {}  # what was found for a kind of call


@dataclass(frozen=True)
class Kernel:
    """One function with a reference and faster implementations; `kernel(*args)` runs the one that fits.

    Args:
        name: of the operator, torch.ops.hf_lowmem.<name>.
        reference: plain torch, annotated: the operator's schema is read from its signature.
        triton: "package.module:function", same signature; imported when first needed.
        cpu: the same, for a CPU; "" where there is none.
        fake: shapes and dtypes of the results without computing them. None where nothing is returned.
        mutates: names of the arguments that are written in place.
        supports: why Triton cannot take these arguments, or "" if it can.
        cases: arguments on which the two are compared.
        parts: of a case, others that launch what it does not; a kernel proves itself on those too.
        bound: how far apart the two may be: from the arguments of a call, the largest |kernel - reference| allowed for
            each result and then for each argument that is written in place, as a tensor or a number; 0: the same bits.
            None: the same bits throughout. For kernels that sum, whose order of summation differs; the comment at its
            definition derives it.
    """

    name: str
    reference: Implementation
    triton: str
    cpu: str = ""
    fake: Callable[..., Any] | None = None
    mutates: tuple[str, ...] = ()
    supports: Callable[..., str] = lambda *args: ""
    cases: Callable[[], Iterable[Case]] = tuple
    parts: Callable[[Case], Iterable[Case]] = lambda case: ()
    bound: Callable[..., Sequence[Tensor | float]] | None = None
    op: Any = field(init=False, repr=False)
    _written: tuple[int, ...] = field(init=False, repr=False)  # places of the arguments that are

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
        names = [argument.name for argument in op._opoverload._schema.arguments]
        object.__setattr__(self, "_written", tuple(i for i, name in enumerate(names) if name in self.mutates))

    def __call__(self, *args: Any) -> Any:
        """Call the operator. Arguments are positional, as in its schema.

        On a CPU it is passed by where nobody listens to it: its own time is that of a step of 20,000 values.
        """
        if not self.cpu or not _unheard(args):
            return self.op(*args)
        result = self.pick(*args)(*args)
        torch.autograd.graph.increment_version([t for i in self._written for t in _tensors(args[i : i + 1])])
        return result

    def directly(
        self, device: torch.device, kind: tuple[object, ...], args: Callable[[], tuple[object, ...]]
    ) -> Implementation | None:
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

    def load_triton(self) -> Implementation:
        """The Triton implementation. Raises ImportError where triton is not installed."""
        return _load(self.triton)

    def load_cpu(self) -> Implementation:
        """The implementation for a CPU. Raises ImportError where numba is not installed."""
        return _load(self.cpu)

    def pick(self, *args: Any) -> Implementation:
        """The implementation for these arguments.

        Raises:
            RuntimeError: where one is forced and cannot take them; the message says why.
        """
        impl = current_impl()
        if impl == "reference":
            return self.reference
        reason = self.unsupported(*args) or self.unproved(*args)
        if not reason:
            return self.load_cpu() if self._fast(args) == "cpu" else self.load_triton()
        if impl != "auto":
            raise RuntimeError(f"kernel {self.name!r} is forced to {impl}, but {reason}. Leave {VARIABLE} unset.")
        return self.reference

    def _fast(self, args: Iterable[object]) -> str:
        """The one of the two fast implementations that is meant: the forced one, or by the tensors' device."""
        impl = current_impl()
        if impl in ("triton", "cpu"):
            return impl
        return "cpu" if self.cpu and {t.device.type for t in _tensors(args)} == {"cpu"} else "triton"

    def unsupported(self, *args: Any) -> str:
        """Why no fast implementation, or not the forced one, runs on these arguments, or ""."""
        if self._fast(args) == "cpu":
            return self._unsupported_on_cpu(args)
        devices = {t.device.type for t in _tensors(args)}
        if devices == {"cpu"} and not (current_impl() == "triton" and os.environ.get("TRITON_INTERPRET") == "1"):
            return "the tensors are on a CPU, where Triton runs in its interpreter only (TRITON_INTERPRET=1)"
        if not devices or not devices <= {"cpu", "cuda"}:
            return f"Triton does not run on {', '.join(sorted(devices)) or 'no tensor'}"
        if not has_triton():
            return "triton is not installed"
        device = _gpu(args)
        return self.supports(*args) or (distrusted(self.name, device) if device is not None else "")

    def _unsupported_on_cpu(self, args: Iterable[object]) -> str:
        tensors = list(_tensors(args))
        if not self.cpu:
            return "it has no implementation for a CPU but its reference"
        if {t.device.type for t in tensors} != {"cpu"}:
            return "its tensors are not all on a CPU"
        if not has_numba():
            return f"numba is not installed ({INSTALL})"
        dtypes = {t.dtype for t in tensors} | {arg for arg in args if isinstance(arg, torch.dtype)}
        if dtypes & {torch.float16, torch.float64}:
            return "on a CPU it knows no float16 and no float64"
        return distrusted(self.name, CPU)

    def unproved(self, *args: Any) -> str:
        """Why it has not proved itself on such arguments, or "". At the first use on a device this is found out."""
        if self._fast(args) == "cpu":
            return prove(self, args, CPU, "cpu")
        device = _gpu(args)
        return "" if device is None else prove(self, args, device)


def _load(place: str) -> Implementation:
    module, _, function = place.partition(":")
    return getattr(import_module(module), function)


def _tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    """All tensors among the arguments and in lists of them."""
    for arg in args:
        for item in arg if isinstance(arg, list | tuple) else (arg,):
            if isinstance(item, Tensor):
                yield item


def _unheard(args: Iterable[object]) -> bool:
    """Whether a call on plain tensors of a CPU concerns nobody else: no gradients, modes, profiler, compiler."""
    # First of all, as the compiler cannot trace the others.
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return False
    if torch._C._len_torch_dispatch_stack() or torch.autograd._profiler_enabled():
        return False
    return all(t.is_cpu and type(t) in (Tensor, torch.nn.Parameter) for t in _tensors(args))


def _gpu(args: Iterable[Any]) -> torch.device | None:
    """The GPU of the first tensor that is on one."""
    return next((t.device for t in _tensors(args) if t.device.type == "cuda"), None)


@functools.cache
def has_triton() -> bool:
    """Whether triton is installed; it is not imported."""
    from importlib.util import find_spec

    return find_spec("triton") is not None


@functools.cache
def has_numba() -> bool:
    """Whether numba, the compiler of the CPU's kernels, is installed; it is not imported."""
    from importlib.util import find_spec

    return find_spec("numba") is not None
