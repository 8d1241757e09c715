"""A kernel proves itself at its first use on a device: one small case against the reference, before it is trusted.

Kernels are tested in an interpreter, or on another CPU, and compiled for devices that are not there. What a driver, a
compiler of another version or a broken card makes of them shows on the device alone; so there, and on a user's CPU, a
kernel of each kind of call (its dtypes, codecs and flags) is compared once, in milliseconds beside its compilation. One
that differs or cannot be compiled is not used from then on, by any call on that device, a warning says so, and the
reference runs.

What was proved is remembered in a file, by device, driver, versions and the kernels' own source, so that the next
process need not compare. What failed is not: it is tried again. A folder that cannot be written costs the comparison
in each process, and no more.

Processes of one training do not ask each other. They need not: a kernel and its reference give the same bits, so a rank
whose card fails computes what the others do, only slower.
"""

import functools
import hashlib
import json
import logging
import os
import platform
import re
import tempfile
import threading
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

import hf_lowmem
from hf_lowmem.kernels.choice import VARIABLE, current_impl
from hf_lowmem.kernels.compare import CPU, Case, Comparable, difference

logger = logging.getLogger(__name__)

Kind = tuple[Any, ...]
_proved: set[tuple[str, torch.device, Kind]] = set()
_failed: dict[tuple[str, torch.device], str] = {}
_lock = threading.RLock()  # backward runs in a thread for each device


def distrusted(name: str, device: torch.device) -> str:
    """Why the kernel of that name is not to be used on the device, or "" where nothing is known against it."""
    return _failed.get((name, device), "") if _failed else ""


def is_proved(name: str, args: tuple[object, ...], device: torch.device) -> bool:
    """Whether the kernel of that name was compared on the device for such arguments, in this process or before."""
    return (name, device, kind(args)) in _proved


def prove(kernel: Comparable, args: tuple[object, ...], device: torch.device, impl: str = "triton") -> str:
    """Compare the kernel on a case like this call, unless that was done; why it is not to be used, or "".

    `impl`: which implementation, "triton" or "cpu".

    While a CUDA graph is captured nothing can be compared, as that would wait for the device: a kernel that is used
    there for the first time is taken on trust, and compared at its next use outside.
    """
    what = kernel.name, device, kind(args)
    if what in _proved:
        return ""
    if reason := distrusted(kernel.name, device):
        return reason
    if _capturing(device):
        return ""
    with _lock:
        if what in _proved or (kernel.name, device) in _failed:  # by another thread meanwhile
            return distrusted(kernel.name, device)
        file = _file(kernel, device, what[-1])
        if not _remembered(file):
            try:
                reason = _compare(kernel, what[-1], device, impl)
            except torch.OutOfMemoryError:  # says nothing of the kernel, and the call itself will say it
                return ""
            except Exception as error:
                reason = f"it fails with {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if reason:
                _failed[kernel.name, device] = reason
                if current_impl() == "auto":
                    _warn(kernel, device, reason, impl)
                return reason
            _remember(file, kernel, device)
        _proved.add(what)
    return ""


def kind(args: tuple[object, ...]) -> Kind:
    """All of a call by which Triton's code differs: dtypes, names and flags. Of a list, its first entry's."""
    return tuple(map(_kind_of, args))


def _kind_of(arg: object) -> object:
    if isinstance(arg, Tensor):
        return arg.dtype
    if isinstance(arg, list | tuple):
        return _kind_of(arg[0]) if arg else None
    return arg if arg is None or isinstance(arg, str | bool | torch.dtype) else type(arg)


def like(kernel: Comparable, wanted: Kind) -> Case:
    """The first of the kernel's cases of that kind; where there is none, the first of those with most in common."""
    best, most = None, -1
    for case in kernel.cases():
        common = sum(a == b for a, b in zip(kind(case.make(CPU)), wanted, strict=True))
        if common > most:
            best, most = case, common
        if most == len(wanted):
            break
    assert best is not None, f"{kernel.name} has no cases"
    return best


def _compare(kernel: Comparable, wanted: Kind, device: torch.device, impl: str = "triton") -> str:
    """Compare on plain tensors, whatever modes and defaults the caller has set: "" where both agree."""
    dtype = torch.get_default_dtype()
    plain = torch.autocast("cpu", enabled=False), torch._C.DisableTorchFunction()
    with torch.no_grad(), _disable_current_modes(), plain[0], plain[1]:
        torch.set_default_dtype(torch.float32)
        try:
            case = like(kernel, wanted)
            for each in (case, *(kernel.parts(case) if impl == "triton" else ())):
                if found := difference(kernel, each, device, impl):
                    return f"on {each.name!r} it is not what the reference computes, {found}"
        finally:
            torch.set_default_dtype(dtype)
    return ""


def _warn(kernel: Comparable, device: torch.device, reason: str, impl: str) -> None:
    compiler = "numba" if impl == "cpu" else "triton or of the driver"
    logger.warning(
        "kernel %r is not used on %s: %s. Its reference runs instead, with the same result: tens of torch operators "
        "with fp32 temporaries where the kernel passes over memory once, so this part of a step is several times "
        "slower and needs more memory. `hf-lowmem doctor` compares all kernels on this device; another version of "
        "%s may cure it. %s=reference says that this is known.",
        kernel.name, facts(device)["device"], reason, compiler, VARIABLE,
    )  # fmt: skip


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.cache
def facts(device: torch.device) -> dict[str, str]:
    """The device, its driver and all versions that what a kernel becomes depends on."""
    found = {"hf-lowmem": hf_lowmem.__version__, "torch": str(torch.__version__), "source": source_hash()}
    if device.type == "cpu":
        names = {
            "device": cpu_name(),
            "driver": platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        }
        return names | found | {name: _version(name) for name in ("numba", "llvmlite", "numpy")}
    return found | {
        "device": torch.cuda.get_device_name(device),
        "driver": driver_version(),
        "cuda": str(torch.version.cuda or torch.version.hip),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "triton": _version("triton"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def cpu_name() -> str:
    """The CPU's name and what it can do, as Linux has them, or what Python knows."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return name[1] if name else platform.machine()


def driver_version() -> str:
    """The version of the GPU's driver as Linux has it, or ""."""
    for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError:
            continue
        found = re.search(r"\d+(?:\.\d+)+", text)
        return found[0] if found else text.strip()
    return ""


@functools.cache
def source_hash() -> str:
    """Hash, 16 hex digits, of all files in the kernels' folder: kernels share most of their formulas."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """Folder in which what was proved is remembered: beside HuggingFace's own caches, or in the user's."""
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hf_lowmem" / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hf_lowmem" / "kernels"


def _file(kernel: Comparable, device: torch.device, wanted: Kind) -> Path | None:
    key = json.dumps([kernel.name, repr(wanted), facts(device)], sort_keys=True)
    try:
        return cache_folder() / f"{kernel.name}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    except RuntimeError:  # there is no home
        return None


def _remembered(file: Path | None) -> bool:
    return file is not None and file.is_file()


def _remember(file: Path | None, kernel: Comparable, device: torch.device) -> None:
    """Write the record of a proof to a temporary file and rename it, so that no process reads half of it."""
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as made:
            json.dump({"kernel": kernel.name, **facts(device)}, made, indent=1)
        Path(made.name).replace(file)
    except OSError as error:
        logger.info("what was proved of %s is not remembered: %s", kernel.name, error)
