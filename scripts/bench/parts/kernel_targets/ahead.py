"""Kernels compiled for GPUs that are not there: registers, spills and shared memory of every one, on every target.

Triton needs no device to compile for one: it carries ptxas for NVIDIA and LLVM's backend for AMD. A kernel that does
not compile for a card, or that spills registers to memory on it, is found on any machine, long before that card is.
The table is the proof that sm_75 (no bf16, no fp8 instructions) and AMD run the same source.

Each kernel's triton.py says what to compile: `compile_cases()` gives (label, kernel, signature, constants, warps) at
the shapes of an 8B model (hidden 4096, ffn 14336). A signature's type ending in `:16` is an integer that divides by 16,
as a launch would find out; pointers always do, as torch's allocations start at multiples of 512 bytes.

Triton's interpreter replaces kernels as they are decorated, so the process must not have TRITON_INTERPRET=1.
"""

import importlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from hf_lowmem.kernels import KERNELS

TARGETS: dict[str, GPUTarget] = {
    **{f"cuda:{arch}": GPUTarget("cuda", arch, 32) for arch in (75, 80, 89, 90, 100, 120)},
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
    "hip:gfx1100": GPUTarget("hip", "gfx1100", 32),
}
# What a PTX must not hold if its floats are to be the reference's: denormals flushed, approximate functions.
INEXACT = re.compile(r"^\s*(?:@\S+\s+)?(\S+\.ftz\S*|\S+\.approx\S*|div\.full\S*)\s", re.MULTILINE)
# The short reciprocal and root of _device.py are no lines of their own, and not found: they have a test of their own.
# Nor products fused into sums, but for those that the kernel asks for (_device.py: fma), which LLVM's code shows.
FUSED = re.compile(r"^\s*(?:@\S+\s+)?(?:fma|mad)\.\S*?f(?:32|64)(?:x(\d+))?\s", re.MULTILINE)
ASKED = re.compile(r"\bcall\b[^\n]*@llvm\.fma\.(?:v(\d+))?f(?:32|64)\(")


@dataclass(frozen=True)
class CompileCase:
    """One kernel at one shape. `kernel` is the name in KERNELS' folder, `function` the device function's."""

    kernel: str
    label: str
    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int


@dataclass(frozen=True)
class Weight:
    """What one kernel takes on one target: registers of a thread, bytes that a thread spills, bytes of shared memory.

    On AMD `spills` counts spilled vector and scalar registers, 4 bytes each, and scratch memory. `inexact`: how often
    each instruction of INEXACT occurs, and "fused" (NVIDIA; on AMD a division is made of fused operations, and yet
    correctly rounded, so that nothing can be told from them).
    """

    kernel: str
    label: str
    target: str
    warps: int
    registers: int
    spills: int
    shared: int
    inexact: dict[str, int]

    def row(self) -> dict[str, Any]:
        return asdict(self)


def compile_cases(only: str = "") -> list[CompileCase]:
    """All cases of KERNELS' Triton modules, or those with `only` in their folder's name or label.

    Raises:
        ValueError: if there is none.
    """
    found = []
    for module in sorted({kernel.triton.partition(":")[0] for kernel in KERNELS.values()}):
        folder = module.split(".")[-2]
        for label, function, signature, constants, warps in importlib.import_module(module).compile_cases():
            if only in folder or only in label:
                found.append(CompileCase(folder, label, function, signature, constants, warps))
    if not found:
        raise ValueError(f"only={only!r}: no kernel's folder or label has this in it")
    return found


def weigh(case: CompileCase, target: str) -> Weight:
    """Compile one case for one target and read what it takes. Raises as `compiled_for`."""
    return weight_of(compiled_for(case, target), case.kernel, case.label, target, case.warps)


def compiled_for(case: CompileCase, target: str) -> triton.compiler.CompiledKernel:
    """Triton's compiled kernel of one case for one target.

    Raises:
        RuntimeError: in a process with TRITON_INTERPRET=1.
        ValueError: if the signature and the constants are not the kernel's parameters.
    """
    check_compiled(case.function, case.kernel)
    names = case.function.arg_names
    if set(names) != set(case.signature) | set(case.constants) or set(case.signature) & set(case.constants):
        odd = set(names) ^ (set(case.signature) | set(case.constants)) or set(case.signature) & set(case.constants)
        raise ValueError(
            f"compile_cases() of {case.kernel}, {case.label!r}: {', '.join(sorted(odd))} must be once in the signature "
            f"or the constants, and parameters of {case.function.__name__}"
        )
    kinds = {name: case.signature.get(name, "constexpr") for name in names}
    attributes: dict[Any, Any] = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(kinds.values())
        if kind.startswith("*") or kind.endswith(":16")
    }
    types = {name: kind.removesuffix(":16") for name, kind in kinds.items()}
    source = triton.compiler.ASTSource(case.function, types, case.constants, attributes)
    options = {"num_warps": case.warps, "enable_fp_fusion": False}
    return triton.compile(source, target=TARGETS[target], options=options)


def check_compiled(function: Any, kernel: str) -> None:
    """Raise RuntimeError where the interpreter has taken a kernel's place."""
    if not isinstance(function, triton.runtime.JITFunction):
        raise RuntimeError(
            "kernels are compiled ahead of time in a process without TRITON_INTERPRET=1: it was set when "
            f"{kernel}/triton.py was imported, and its kernels are the interpreter's now. Unset it."
        )


def weight_of(compiled: Any, kernel: str, label: str, target: str, warps: int) -> Weight:
    """What one of Triton's compiled kernels takes."""
    read = _read_cuda if TARGETS[target].backend == "cuda" else _read_hip
    return Weight(kernel, label, target, warps, **read(compiled))


def _read_cuda(compiled: Any) -> dict[str, Any]:
    """From the cubin itself: what cuobjdump calls STACK is local memory in a kernel without arrays, that is, spills."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True)
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", done.stdout)}
    return {
        "registers": usage["REG"],
        "spills": usage["STACK"] + usage["LOCAL"],
        "shared": compiled.metadata.shared,
        "inexact": inexact(compiled.asm["ptx"], compiled.asm["llir"]),
    }


def inexact(ptx: str, llir: str) -> dict[str, int]:
    """How often what INEXACT and FUSED name occurs: {} for a kernel of single, correctly rounded operations."""
    found = Counter(INEXACT.findall(ptx))
    fused = sum(int(width or 1) for width in FUSED.findall(ptx)) - sum(int(width or 1) for width in ASKED.findall(llir))
    return dict(found) | ({"fused": fused} if fused else {})


def _read_hip(compiled: Any) -> dict[str, Any]:
    """From the metadata that LLVM writes into the assembly."""

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", compiled.asm["amdgcn"])
        assert found, f"LLVM's metadata has no {name}"
        return int(found[1])

    spilled = 4 * (field("vgpr_spill_count") + field("sgpr_spill_count"))
    return {
        "registers": field("vgpr_count"),
        "spills": max(spilled, field("private_segment_fixed_size")),
        "shared": field("group_segment_fixed_size"),
        "inexact": {},
    }


def table(weights: Iterable[Weight]) -> str:
    """One line a case: registers/shared bytes on each target, and `!n` where n bytes spill."""
    cells: dict[tuple[str, str, int], dict[str, str]] = {}
    for w in weights:
        text = f"{w.registers}/{w.shared}" + (f" !{w.spills}" if w.spills else "")
        cells.setdefault((w.kernel, w.label, w.warps), {})[w.target] = text
    columns = [target for target in TARGETS if any(target in row for row in cells.values())]
    rows = [["kernel", "case", "warps", *columns]]
    rows += [[*map(str, case), *(row.get(column, "") for column in columns)] for case, row in cells.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "".join("  ".join(map(str.ljust, row, widths)).rstrip() + "\n" for row in rows)
