"""Part kernels: each kernel against its reference on all its cases, and its speed at the shapes of an 8B model.

Equality is between Triton on the device and the reference *on the CPU*: the promise is one function on every device.
Speed is bytes that must move (hf_lowmem/kernels/large.py) over time, beside a device-to-device copy of the same run.
The reference's time is that of the same torch operators on the device, what one has without the kernel.
"""

from collections.abc import Callable, Iterator

import torch

from hf_lowmem.kernels import KERNELS, use_kernels
from hf_lowmem.kernels.compare import difference
from hf_lowmem.kernels.large import FFN, HIDDEN, TOKENS, bytes_moved, large
from parts.gpu.timing import copy_bandwidth, free, seconds_of
from parts.record import Row


def rows(device: torch.device, toy: bool, in_time: Callable[[], bool]) -> Iterator[Row]:
    for name, kernel in KERNELS.items():
        cases = list(kernel.cases())
        if toy:
            cases = cases[:: max(1, len(cases) // 3)]
        wrong = {case.name: why for case in cases if (why := difference(kernel, case, device))}
        yield {"kernel": name, "case": f"{len(cases)} cases", "equal": not wrong, "wrong": bool(wrong), "differ": wrong}
    roof = copy_bandwidth(device, 1 << (16 if toy else 30))
    yield {"kernel": "device copy", "case": "1 GiB", "bandwidth": roof}
    sizes = (3, 40, 96) if toy else (TOKENS, HIDDEN, FFN)
    for (name, case), make in large(*sizes).items():
        row: Row = {"kernel": name, "case": f"{case} {sizes}"}
        if not in_time():
            yield row | {"note": "left out: no time"}
            continue
        free(device)
        kernel, args = KERNELS[name], make(device)
        with use_kernels("triton"):
            results = kernel(*args)
            moved = bytes_moved(kernel, args, results)
            del results
            seconds = seconds_of(lambda k=kernel, a=args: k(*a), device, repeats=2 if toy else 20)
        with use_kernels("reference"):
            plain = seconds_of(lambda k=kernel, a=args: k(*a), device, repeats=2 if toy else 5, warm_up=1)
        yield row | {
            "bytes": moved,
            "seconds": seconds,
            "bandwidth": moved / seconds,
            "of_copy_bandwidth": moved / seconds / roof,
            "reference_seconds": plain,
            "speed_up": plain / seconds,
        }
