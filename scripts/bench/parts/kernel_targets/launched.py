"""Every specialisation that the equality cases would launch on a device, compiled for one that is not there.

Triton compiles a kernel anew for each kind of arguments: for dtypes, for an integer that is 1 or divides by 16, for
an address that is aligned, for each constant. What a hand-written list of signatures (`compile_cases()`, ahead.py) has
is the hot path of an 8B model; a row of one value is compiled when somebody's model has one, and may not compile.

Here nothing is guessed: the kernel's own Triton function is called on each case, with a driver in the real one's place
that names the target, and with every launch ended where the compiled kernel would be loaded. So it is Triton's own
launcher that decides what is compiled, on each target as it would there.

As in ahead.py the process must not have TRITON_INTERPRET=1.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from triton.runtime import JITFunction, driver

from hf_lowmem.kernels import KERNELS, Kernel
from parts.kernel_targets.ahead import TARGETS, CompileCase, Weight, check_compiled, compile_cases, weigh, weight_of

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Failure:
    """A launch that does not compile: by which kernel and case, of which device function, and why."""

    kernel: str
    label: str
    target: str
    function: str
    error: str

    def __str__(self) -> str:
        return f"{self.kernel}, {self.label}, {self.function} on {self.target}: {self.error}"


class _Absent:
    """Triton's driver for a device that is not there: all that a launch asks before it loads what it compiled."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return TARGETS[self.target]

    def get_current_device(self) -> str:
        """The key under which a JITFunction keeps what it compiled: never that of a real device, which is a number."""
        return f"absent {self.target}"

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def _compile_only(target: str) -> Iterator[list[tuple[JITFunction, Any]]]:
    """Inside the block each launch compiles for `target` and runs nothing; the list gets (function, what came of it).

    What came of it is Triton's compiled kernel, the same object for the same specialisation, or the exception.
    """
    came: list[tuple[JITFunction, Any]] = []
    run, active = JITFunction.run, driver._active

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        try:
            came.append((self, run(self, *args, grid=grid, warmup=True, **options)))
        except Exception as error:  # of any kind: Triton's passes raise what LLVM and ptxas give them
            came.append((self, error))

    JITFunction.run = compile_only
    driver.set_active(_Absent(target))  # type: ignore[arg-type]
    try:
        yield came
    finally:
        JITFunction.run = run
        driver._active = active


def weigh_launched(target: str, only: str = "") -> Iterator[Weight | Failure]:
    """What each distinct launch of the cases takes on `target`, under the first case that has it, or why it fails.

    Args:
        target: a key of TARGETS.
        only: part of "folder kernel case", such as "rmsnorm" or "quantize e4m3"; "" takes all.

    Raises:
        RuntimeError: in a process with TRITON_INTERPRET=1.
    """
    seen: set[int] = set()
    keep: list[Any] = []  # an id is only of one object while that lives
    for kernel in KERNELS.values():
        launch = kernel.load_triton()
        for case in kernel.cases():
            if only not in f"{folder_of(kernel)} {kernel.name} {case.name}":
                continue
            args = case.make(CPU)
            with _compile_only(target) as came:
                launch(*args)
            for function, compiled in came:
                name = function.fn.__name__
                if isinstance(compiled, Exception):
                    yield Failure(kernel.name, case.name, target, name, reason(compiled))
                elif id(compiled) not in seen:
                    seen.add(id(compiled))
                    keep.append(compiled)
                    check_compiled(function, kernel.name)
                    yield weight_of(compiled, kernel.name, f"{case.name}, {name}", target, compiled.metadata.num_warps)


def weigh_hot(target: str, only: str = "") -> Iterator[Weight | Failure]:
    """What each of `compile_cases()` takes on `target`, or why it fails. Raises as `compile_cases` does."""
    return _weigh_each(compile_cases(only), target)


def weigh_ones(target: str, only: str = "") -> Iterator[Weight | Failure]:
    """Every device function with its integers at 1, each alone and all together, where Triton makes constants of them.

    A constant has no methods of a tensor, and a loop of one pass, a stride of one or a grid of one may be folded away
    into something that does not compile. Cases hold a few such shapes; here is every one that a launch can make.
    """
    functions: dict[Any, CompileCase] = {}
    for case in compile_cases():
        if only in case.kernel or only in case.label:
            functions.setdefault(case.function, case)
    return _weigh_each(itertools.chain.from_iterable(map(_with_ones, functions.values())), target)


def _with_ones(case: CompileCase) -> Iterator[CompileCase]:
    """The case with one of its integers at 1, then with all of them."""
    skipped = case.function.do_not_specialize
    integers = [name for name, kind in case.signature.items() if kind.startswith("i") and name not in skipped]
    for ones in [[name] for name in integers] + ([integers] if len(integers) > 1 else []):
        signature = {name: kind for name, kind in case.signature.items() if name not in ones}
        label = f"{case.label}, {', '.join(ones)} = 1"
        yield replace(case, label=label, signature=signature, constants=case.constants | dict.fromkeys(ones, 1))


def _weigh_each(cases: Iterable[CompileCase], target: str) -> Iterator[Weight | Failure]:
    for case in cases:
        try:
            yield weigh(case, target)
        except Exception as error:
            yield Failure(case.kernel, case.label, target, case.function.fn.__name__, reason(error))


def folder_of(kernel: Kernel) -> str:
    return kernel.triton.partition(":")[0].split(".")[-2]


def reason(error: BaseException) -> str:
    """The innermost cause, on one line: Triton wraps what went wrong in one error for each call inside the kernel."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]
