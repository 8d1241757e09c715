"""Every kernel on all its cases on one device, against the reference, and its speed at the size of an 8B model."""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from hf_lowmem.kernels import KERNELS, Case, Kernel, use_kernels
from hf_lowmem.kernels.compare import CPU, difference, on
from hf_lowmem.kernels.large import FFN, HIDDEN, TOKENS, bytes_moved, large
from hf_lowmem.kernels.proof import cpu_name
from hf_lowmem.kernels.registry import INSTALL, has_numba, has_triton

REPEATS = 20


@dataclass
class Trial:
    """Result of comparing one kernel with its reference, and of timing it.

    Attributes:
        cases: how many were compared.
        exact: whether the kernel promises its reference's bits; else it stays within a bound.
        wrong: case → how the kernel differs, or the error.
        seconds: of one call at the size of an 8B model; None where not measured.
        bandwidth: bytes per second in that call, of those that must move; None where not measured.
    """

    kernel: str
    cases: int
    exact: bool
    wrong: dict[str, str] = field(default_factory=dict)
    seconds: float | None = None
    bandwidth: float | None = None

    def row(self) -> dict[str, Any]:
        return asdict(self)


def device_of_trials() -> tuple[torch.device | None, str]:
    """The device on which kernels are tried, None for none, and a sentence about it."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and has_triton()
    if torch.cuda.is_available() and has_triton() and not interpreted:
        device = torch.device("cuda", torch.cuda.current_device())
        return device, f"Compared on {torch.cuda.get_device_name(device)}."
    if interpreted:
        return torch.device("cpu"), (
            "Compared in Triton's interpreter (TRITON_INTERPRET=1): that proves the kernels' arithmetic, and nothing "
            "of a device or of its speed."
        )
    if has_numba():
        return torch.device("cpu"), (
            f"Compared on {cpu_name()}, compiled by numba; of other kernels the references run on a CPU."
        )
    remedy = f"On a CPU references run, where compiled kernels would be several times as fast: {INSTALL}."
    if not has_triton():
        return None, f"triton is not installed, so there are no kernels to compare; references run everywhere. {remedy}"
    return None, (
        f"There is no GPU here, so no kernel can be run on a device. {remedy} TRITON_INTERPRET=1 hf-lowmem doctor "
        "compares the kernels in Triton's interpreter, which takes minutes."
    )


def trials(device: torch.device) -> Iterator[Trial]:
    """One kernel after the other. What a kernel raises is written down as wrong, and the next is tried."""
    impl = "cpu" if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1" else "triton"
    for kernel in KERNELS.values():
        if impl == "cpu" and not kernel.cpu:
            continue
        trial = Trial(kernel.name, 0, kernel.bound is None)
        for case in kernel.cases():
            if impl == "cpu" and _is_left_to_the_reference(kernel, case):
                continue
            trial.cases += 1
            try:
                found = difference(kernel, case, device, impl)
            except Exception as error:
                found = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if found:
                trial.wrong[case.name] = found
        if device.type == "cuda" and not trial.wrong:
            trial.seconds, trial.bandwidth = speed(kernel, device)
        yield trial


def _is_left_to_the_reference(kernel: Kernel, case: Case) -> bool:
    with use_kernels("cpu"):
        return bool(kernel.unsupported(*case.make(CPU)))


def speed(kernel: Kernel, device: torch.device) -> tuple[float | None, float | None]:
    """Seconds of a call and bytes a second; None twice where the device has not got the memory for it.

    Calls follow each other between two events, so that the host's work is hidden behind the device's, and each works on
    more than a cache holds.
    """
    make = next(make for (name, _), make in large(TOKENS, HIDDEN, FFN).items() if name == kernel.name)
    run = kernel.load_triton()
    try:
        with on(device):
            args = make(device)
            moved = bytes_moved(kernel, args, run(*args))
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(REPEATS):
                run(*args)
            end.record()
            torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        return None, None
    seconds = start.elapsed_time(end) / 1e3 / REPEATS
    return seconds, moved / seconds
