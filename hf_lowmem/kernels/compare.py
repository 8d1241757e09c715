"""A kernel on a device against its reference on the CPU: the promise is one function on every device."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hf_lowmem.kernels.choice import use_kernels

CPU = torch.device("cpu")

Implementation = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One set of arguments, shared by tests, benchmarks and ahead-of-time compilation. `make(device)` builds it.

    `beside(args)` is what Triton is told besides where it is called directly, and the reference finds out for itself.
    """

    name: str
    make: Callable[[torch.device], tuple[Any, ...]]
    beside: Callable[[tuple[object, ...]], dict[str, Tensor]] = lambda args: {}


class Comparable(Protocol):
    """The attributes of a `Kernel` that a comparison of two of its implementations reads."""

    @property
    def name(self) -> str: ...
    @property
    def reference(self) -> Implementation: ...
    @property
    def mutates(self) -> tuple[str, ...]: ...
    @property
    def cases(self) -> Callable[[], Iterable[Case]]: ...
    @property
    def parts(self) -> Callable[[Case], Iterable[Case]]: ...
    @property
    def bound(self) -> Callable[..., Sequence[Tensor | float]] | None: ...
    @property
    def op(self) -> Any: ...
    def load_triton(self) -> Implementation:
        """The Triton implementation."""
        ...

    def load_cpu(self) -> Implementation:
        """The implementation for a CPU."""
        ...


def difference(kernel: Comparable, case: Case, device: torch.device, impl: str = "triton") -> str:
    """Difference between Triton on the device and the reference on the CPU, in words; "" where they agree.

    `impl`: "triton", or "cpu" for that implementation in its place. They agree where shapes, dtypes, strides and bits
    are the same, or within the kernel's own bound; any nan is like any other, since which of them an operation makes is
    a device's own affair. Both are called directly, past the operator and past HF_LOWMEM_KERNELS. Raises what the
    kernel raises, on compilation or as it runs.
    """
    here, there, before = case.make(CPU), case.make(device), case.make(CPU)
    # Forced, because an automatic reference on a CPU takes torch's own square root, which is not correctly rounded.
    with use_kernels("reference"):
        want = _tensors(kernel.reference(*here)) + written(kernel, here)
    with on(device):
        if impl == "cpu":
            got = _tensors(kernel.load_cpu()(*there)) + written(kernel, there)
        else:
            got = _tensors(kernel.load_triton()(*there, **case.beside(there))) + written(kernel, there)
    if len(got) != len(want):
        return f"{len(got)} tensors in place of {len(want)}"
    bounds = [0.0] * len(want) if kernel.bound is None else kernel.bound(*before)
    for i, (g, w, bound) in enumerate(zip(got, want, bounds, strict=True)):
        if found := _difference(g, w, bound):
            return f"tensor {i}: {found}"
    return ""


def written(kernel: Comparable, args: tuple[Any, ...]) -> list[Tensor]:
    """The tensors that a call writes in place, in the order of its arguments."""
    names = [argument.name for argument in kernel.op._opoverload._schema.arguments]
    return _tensors([arg for name, arg in zip(names, args, strict=True) if name in kernel.mutates])


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _difference(got: Tensor, want: Tensor, bound: Tensor | float) -> str:
    for what in ("shape", "dtype"):
        if getattr(got, what) != getattr(want, what):
            return f"{what} {getattr(got, what)} in place of {getattr(want, what)}"
    if got.stride() != want.stride():
        return f"strides {got.stride()} in place of {want.stride()}"
    got = got.cpu()
    if not want.is_floating_point():
        wrong = got != want
    elif not torch.equal(got.isnan(), want.isnan()):
        return "nan in other places"
    elif isinstance(bound, float) and bound == 0.0:
        wrong = ((got != want) | (got.signbit() != want.signbit())) & ~want.isnan()
    else:
        wrong = (got.double() - want.double()).abs() > bound  # a nan is above nothing
    if not wrong.any():
        return ""
    gap = (got.double() - want.double()).abs()[wrong].nan_to_num().max().item()
    return f"{int(wrong.sum())} of {wrong.numel()} values differ, by {gap:.3g} at most"
