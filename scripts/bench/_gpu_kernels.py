"""Part kernels: each kernel against its reference on all its cases, and its speed at the shapes of an 8B model.

Equality is between Triton on the device and the reference *on the CPU*: the promise is one function on every device.
Speed is bytes that must move (each tensor read once, each result written once, what is changed in place both) over
time, beside a device-to-device copy of the same run. The reference's time is that of the same torch operators on the
device, what one has without the kernel.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from _gpu_time import copy_bandwidth, free, seconds_of
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hf_lowmem.kernels import KERNELS, Case, Kernel, use_kernels
from hf_lowmem.kernels.codecs.cases import room
from hf_lowmem.kernels.codecs.reference import encode_state
from hf_lowmem.kernels.quantize.reference import quantize

BF16 = torch.bfloat16
HIDDEN, FFN, TOKENS = 4096, 14336, 8192


def draw(device: torch.device, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, device=device, generator=generator, dtype=torch.float32).to(dtype)


def codes(device: torch.device, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    bits = torch.randint(0, 126, shape, device=device, generator=generator, dtype=torch.uint8)
    return bits, torch.full((*shape[:-1], -(-shape[-1] // 128)), 0.01, dtype=BF16, device=device)


def large(tokens: int, hidden: int, ffn: int) -> dict[tuple[str, str], Callable[[torch.device], tuple[Any, ...]]]:
    """(kernel, what) → its arguments on a device."""

    def state(device: torch.device, codec: str, signed: bool) -> tuple[Any, ...]:
        x = draw(device, ffn, hidden, dtype=torch.float32)
        return (x if signed else x.square(), *room(codec, x.shape, signed, device), codec, signed, 1, 0)

    def stored(device: torch.device, codec: str, signed: bool) -> tuple[Any, ...]:
        x, codes_, scalars, *_ = state(device, codec, signed)
        encode_state(x, codes_, scalars, codec, signed, None, 0)
        return codes_, scalars, codec, signed

    def unit(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (gate, scales), (up, more) = codes(device, tokens, ffn), codes(device, tokens, ffn)
        return gate, up, scales, more

    found: dict[tuple[str, str], Callable[[torch.device], tuple[Any, ...]]] = {
        ("quantize", "e4m3"): lambda d: (draw(d, tokens, hidden), "e4m3", None),
        ("quantize", "int8"): lambda d: (draw(d, tokens, hidden), "int8", None),
        ("dequantize", "e4m3"): lambda d: (*codes(d, tokens, hidden), "e4m3", BF16),
        ("dequantize", "int8"): lambda d: (*quantize(draw(d, tokens, hidden), "int8", None), "int8", BF16),
        ("rmsnorm", "bf16"): lambda d: (draw(d, tokens, hidden), draw(d, hidden), None, 1e-5, False, True, None),
        ("rmsnorm_again", "bf16"): lambda d: (*codes(d, tokens, hidden), draw(d, hidden), 1e-5, False, True, BF16),
        ("rmsnorm_backward", "bf16"): lambda d: (
            draw(d, tokens, hidden), *codes(d, tokens, hidden), draw(d, hidden), None, 1e-5, False, BF16, True,
        ),
        ("glu_save", "silu"): lambda d: (draw(d, tokens, ffn), draw(d, tokens, ffn), "silu", None, None),
        ("glu", "silu, from codes"): lambda d: (*unit(d), "silu", BF16),
        ("glu_backward", "silu, from codes"): lambda d: (draw(d, tokens, ffn), *unit(d), "silu", BF16),
    }  # fmt: skip
    for codec, signed in (("int8", True), ("int8_softsign", True), ("fp8_expand", True), ("fp8_expand", False)):
        kind = f"{codec}, {'signed' if signed else 'unsigned'}"
        found["encode_state", kind] = lambda d, c=codec, s=signed: state(d, c, s)
        found["decode_state", kind] = lambda d, c=codec, s=signed: stored(d, c, s)
    return found


def changed(kernel: Kernel, args: tuple[Any, ...]) -> list[Any]:
    """The arguments that a call writes in place."""
    names = [a.name for a in kernel.op._opoverload._schema.arguments]
    return [arg for name, arg in zip(names, args, strict=True) if name in kernel.mutates]


def bytes_moved(kernel: Kernel, args: tuple[Any, ...], results: Any) -> int:
    """Every tensor once, and once more where it is changed in place. `encode_state` only writes what it changes."""
    again = [] if kernel.name == "encode_state" else changed(kernel, args)
    return sum(t.nbytes for t in tree_leaves((args, results, again)) if isinstance(t, Tensor))


def difference(kernel: Kernel, case: Case, device: torch.device) -> str:
    """ "" where Triton on the device gives what the reference gives on the CPU, else what differs."""
    cpu = torch.device("cpu")
    here, there, before = case.make(cpu), case.make(device), case.make(cpu)
    with use_kernels("reference"):
        want = tree_leaves((kernel(*here), changed(kernel, here)))
    with use_kernels("triton"):
        got = tree_leaves((kernel(*there), changed(kernel, there)))
    want, got = ([t.cpu() for t in ts if isinstance(t, Tensor)] for ts in (want, got))
    bounds = [] if kernel.bound is None else list(kernel.bound(*before))
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        bound = bounds[i] if bounds else 0.0
        if not torch.equal(g.isnan(), w.isnan()) if g.is_floating_point() else False:
            return f"tensor {i}: nan in other places"
        g, w = (t.double().nan_to_num(posinf=1e300, neginf=-1e300) for t in (g, w))
        excess = ((g - w).abs() - bound).max().item() if g.numel() else 0.0
        if excess > 0:
            return f"tensor {i}: {excess:.3g} beyond the bound"
    return ""


def rows(device: torch.device, toy: bool, in_time: Callable[[], bool]) -> Iterator[dict[str, Any]]:
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
        row: dict[str, Any] = {"kernel": name, "case": f"{case} {sizes}"}
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
