"""Arguments on which the two implementations are compared: odd sizes, strides, layouts, and values that bite."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hf_lowmem.kernels.operands.reference import LAYOUTS, code_rows
from hf_lowmem.kernels.quantize.cases import extremes, values
from hf_lowmem.kernels.quantize.reference import GROUPS
from hf_lowmem.kernels.registry import Case

BF16 = torch.bfloat16


def tensors() -> dict[str, Callable[[torch.device], Tensor]]:
    found: dict[str, Callable[[torch.device], Tensor]] = {
        f"{m}x{k} bf16": lambda d, s=(m, k): values(s, BF16, d)
        for m, k in ((48, 144), (1, 16), (33, 1), (70, 130), (0, 32))
    }
    for dtype in (torch.float16, torch.float32):
        found[f"20x80 {dtype}".replace("torch.", "")] = lambda d, t=dtype: values((20, 80), t, d)
    found["extremes"] = lambda d: extremes(BF16, d)
    found["turned"] = lambda d: values((96, 24), BF16, d).t()
    found["columns of a wider one"] = lambda d: values((9, 256), BF16, d)[:, 64:128]
    return found


def factors(length: int, device: torch.device) -> Tensor:
    """Scales as operands have them, from 2**-20 to 2**4, and a nan: of a row that has one."""
    g = torch.Generator().manual_seed(length)
    made = torch.exp2(24 * torch.rand(length, generator=g) - 20).to(BF16).float()
    if length > 64:
        made[3] = math.nan
    return made.to(device)


def row_cases() -> Iterator[Case]:
    for fmt in GROUPS:
        for i, (name, make) in enumerate(tensors().items()):
            for kind in ("plain", "factor", "largest") if i == 0 else ("plain", "factor"):

                def args(d: torch.device, make=make, fmt=fmt, kind=kind, layout=LAYOUTS[i % 3]) -> tuple[object, ...]:
                    x = make(d)
                    factor = factors(x.shape[1], d) if kind == "factor" else None
                    largest = x.float().abs().amax() if kind == "largest" else None
                    return x, factor, largest, fmt, "both" if kind == "largest" else layout

                yield Case(f"{fmt} {name} {kind}", args)


def column_cases() -> Iterator[Case]:
    for fmt in GROUPS:
        for name, make in tensors().items():

            def args(d: torch.device, make=make, fmt=fmt) -> tuple[object, ...]:
                x = make(d)
                return x, factors(x.shape[0], d), fmt

            yield Case(f"{fmt} {name}", args)


def product_cases() -> Iterator[Case]:
    for fmt in GROUPS:
        for m, k, n in ((48, 64, 32), (17, 16, 16), (160, 48, 96)):
            for whole in (False, True):
                for dtype in (BF16, torch.float32):

                    def args(d: torch.device, size=(m, k, n), fmt=fmt, whole=whole, dtype=dtype) -> tuple[object, ...]:
                        m, k, n = size
                        g = torch.Generator().manual_seed(m)
                        found = []
                        for rows in (m, n):
                            x = torch.randn((rows, k), generator=g) * torch.exp(torch.randn((rows, 1), generator=g))
                            codes, _, scales = code_rows(x, None, x.abs().amax() if whole else None, fmt, "rows")
                            found.append((codes.to(d), scales[:1].to(d) if whole else scales.to(d)))
                        return found[0][0], found[1][0], found[0][1], found[1][1], m == 48, dtype

                    kind = "one scale" if whole else "rows"
                    yield Case(f"{fmt} {m}x{k}x{n} {kind} {dtype}".replace("torch.", ""), args)
