"""Steps check and kernels: each kernel against its reference, and its speed at the shapes of an 8B model.

Equality is between Triton on the device and the reference *on the CPU*: the promise is one function on every device.
Speed is bytes that must move (hf_lowmem/kernels/large.py) over time, beside a device-to-device copy of the same run.
"""

import functools
from collections.abc import Iterator, Sequence

import torch

from hf_lowmem.kernels import KERNELS, use_kernels
from hf_lowmem.kernels.compare import difference
from hf_lowmem.kernels.large import FFN, HIDDEN, bytes_moved, large
from parts.gpu.steps import Case
from parts.gpu.timing import cold_seconds, copy_bandwidth, seconds_of
from parts.record import Row

TOKENS = 32768  # enough that a kernel's inputs are far more than the L2


def checks(device: torch.device, names: Sequence[str], most: int) -> Iterator[Case]:
    """Up to `most` cases of each kernel, spread over all of them, one row a kernel."""
    for name in names:
        cases = list(KERNELS[name].cases())
        some = cases[:: -(-len(cases) // most)]

        def compare(kernel=KERNELS[name], some=some) -> Row:
            wrong: dict[str, str] = {}
            for case in some:
                try:
                    why = difference(kernel, case, device)
                except Exception as error:  # a case that does not compile must not hide the others
                    why = f"{type(error).__name__}: {str(error)[-200:]}"
                if why:
                    wrong[case.name] = why
            return {"equal": not wrong, "wrong": bool(wrong), "differ": wrong}

        yield Case({"kernel": name, "case": f"{len(some)} of {len(cases)} cases"}, compare)


def speeds(device: torch.device, toy: bool) -> Iterator[Case]:
    """Each kernel on 32,768 tokens, beside a copy that is measured in the same process."""
    roof = functools.cache(lambda: copy_bandwidth(device, 1 << (16 if toy else 31)))
    sizes = (3, 48, 96) if toy else (TOKENS, HIDDEN, FFN)
    for (name, case), make in large(*sizes).items():

        def measure(name=name, make=make) -> Row:
            kernel, args = KERNELS[name], make(device)
            triton = kernel.load_triton()
            moved = bytes_moved(kernel, args, triton(*args))
            seconds = cold_seconds(lambda: triton(*args), device)
            with use_kernels("triton"):  # by way of the operator, as a layer calls it
                called = seconds_of(lambda: kernel(*args), device, repeats=1 if toy else 20, warm_up=1)
            return {
                "bytes": moved,
                "seconds": seconds,
                "seconds_by_operator": called,
                "bandwidth": moved / seconds,
                "of_copy_bandwidth": moved / seconds / roof(),
            }

        yield Case({"kernel": name, "case": f"{case} {sizes}"}, measure)


def roof(device: torch.device, toy: bool) -> Iterator[Case]:
    """What the device can do at best: copy, and multiply in bf16."""

    def multiply() -> Row:
        n = 64 if toy else 8192
        a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
        seconds = cold_seconds(lambda: a @ b, device)
        return {"seconds": seconds, "flops": 2 * n**3 / seconds}

    yield Case({"case": "copy"}, lambda: {"bandwidth": copy_bandwidth(device, 1 << (16 if toy else 31))})
    yield Case({"case": "bf16 product"}, multiply)
