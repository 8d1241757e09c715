"""How large the offsets of a kernel's addresses become, read from Triton's code before it is compiled for a device.

A value of 32 bits that is too large wraps, and the address with it. Whether that can happen shows in the numbers alone:
each integer of the code has a range, which follows from those of the arguments, of the grid and of the operators. What
was loaded, or was a float, is data (a code's place in a table, a state's power): it is not followed.
"""

import operator
import re
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
TOKENS = 2**20  # times 4,096 values are 2**32
MEMORY = 2**40  # bytes, and values
LINE = re.compile(r'^(%[\w#]+)(?::\d+)? = "?([\w.]+)"?\s*(.*)$')
NAME = re.compile(r"%[\w]+(?:#\d+)?")


class Span(NamedTuple):
    """Range of an integer of `bits`; `data`: of what is not followed; `wraps`: it may have been too large for them."""

    low: int
    high: int
    bits: int
    data: bool = False
    wraps: bool = False


def full(bits: int, **given: bool) -> Span:
    return Span(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, bits, **given)


def corners(f: Callable[[int, int], int], a: Span, b: Span) -> tuple[int, int]:
    found = [f(x, y) for x, y in product((a.low, a.high), (b.low, b.high))]
    return min(found), max(found)


def divide(a: int, b: int) -> int:
    return 0 if b == 0 else abs(a) // abs(b) * (1 if a * b >= 0 else -1)


def mask(a: Span, b: Span) -> tuple[int, int]:
    highs = [s.high for s in (a, b) if s.low >= 0]
    return (0, min(highs)) if highs else (full(a.bits).low, full(a.bits).high)


TWO: dict[str, Callable[[Span, Span], tuple[int, int]]] = {
    "arith.addi": lambda a, b: (a.low + b.low, a.high + b.high),
    "arith.subi": lambda a, b: (a.low - b.high, a.high - b.low),
    "arith.muli": lambda a, b: corners(operator.mul, a, b),
    "arith.shli": lambda a, b: corners(lambda x, y: x << min(max(y, 0), 64), a, b),
    "arith.divsi": lambda a, b: corners(divide, a, b),
    "arith.shrsi": lambda a, b: corners(lambda x, y: x >> min(max(y, 0), 64), a, b),
    "arith.remsi": lambda a, b: (min(a.low, 0), max(min(a.high, b.high - 1), 0)),
    "arith.minsi": lambda a, b: (min(a.low, b.low), min(a.high, b.high)),
    "arith.maxsi": lambda a, b: (max(a.low, b.low), max(a.high, b.high)),
    "arith.andi": mask,
}
SAME = ("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "arith.extsi", "arith.trunci")
ALIKE = "tt.get_program_id", "tt.get_num_programs"


def too_large(code: str, arguments: dict[int, Span], grid: tuple[int, ...]) -> list[str]:
    """Lines of Triton's code where an address is made with an offset that may have wrapped.

    Args:
        arguments: by their places among those that are no constants; pointers and floats are left out.
    """
    known: dict[str, Span] = {}
    made: dict[str, tuple[str, list[str]]] = {}
    found: list[str] = []
    for line in code.splitlines():
        line = re.sub(r" loc\(.*\)$", "", line.strip())
        if line.startswith("tt.func"):
            names = re.findall(r"(%\w+): ", line)
            known |= {names[place]: span for place, span in arguments.items()}
        if line.startswith("^bb"):  # of a loop: what it counts is of this memory
            for counted, bits in re.findall(r"(%\w+): i(32|64)\b", line):
                known[counted] = Span(0, min(full(int(bits)).high, MEMORY), int(bits))
        if (match := LINE.match(line)) is None:
            continue
        name, op, rest = match.groups()
        kind = re.split(r" (?:to|->|:) ", rest)[-1]
        names = NAME.findall(rest.partition(" : ")[0])
        operands = [known.get(n) for n in names]
        if _is_rest(op, names, made):  # a - a // b * b
            op, operands = "arith.remsi", [operands[0], known.get(made[names[1]][1][1])]
        made[name] = op, names
        if op == "tt.addptr" and operands[1] is not None and operands[1].wraps:
            found.append(line)
        if (integer := re.search(r"(?:^|x)i(\d+)>?$", kind)) is not None:
            known[name] = _span(op, rest, int(integer[1]), operands, grid)
    return found


def _is_rest(op: str, names: list[str], made: dict[str, tuple[str, list[str]]]) -> bool:
    if op != "arith.subi" or made.get(names[1], ("", []))[0] != "arith.muli":
        return False
    quotient, divisor = made[names[1]][1]
    return made.get(quotient) == ("arith.divsi", [names[0], divisor])


def _span(op: str, rest: str, bits: int, operands: list[Span | None], grid: tuple[int, ...]) -> Span:
    whole = full(bits)
    if op == "arith.constant":
        value = re.match(r"(?:dense<)?(-?\d+)", rest)
        return full(bits, data=True) if value is None else Span(int(value[1]), int(value[1]), bits)
    if op == "tt.make_range":
        ends = dict(re.findall(r"(start|end) = (\d+)", rest))
        return Span(int(ends["start"]), int(ends["end"]) - 1, bits)
    if op in ALIKE:
        size = grid["xyz".index(rest[0])]
        return Span(0, size - 1, bits) if op == "tt.get_program_id" else Span(size, size, bits)
    spans = [s for s in operands if s is not None]
    if not spans or len(spans) < len(operands) or any(s.data for s in spans):
        return full(bits, data=True)
    wraps = any(s.wraps for s in spans)
    if op in TWO and len(spans) == 2:
        low, high = TWO[op](*spans)
    elif op in SAME:
        low, high = spans[0].low, spans[0].high
    elif op == "arith.extui":
        low, high = (spans[0].low, spans[0].high) if spans[0].low >= 0 else (0, 2 ** spans[0].bits - 1)
    elif op == "arith.select":
        low, high = min(s.low for s in spans[1:]), max(s.high for s in spans[1:])
    else:
        return full(bits, wraps=True)
    if low < whole.low or high > whole.high:
        return full(bits, wraps=True)
    return Span(low, high, bits, wraps=wraps)


# Of each kernel: the sizes of a large problem, and the grid that launches it.
TWICE = 2**33  # values of a parameter, of a state
ROW = {"n": 4096, "per_row": 32, "x_stride": 3 * 4096, "residual_stride": 3 * 4096}
MATRIX = {"m": 2**18, "n": 2**14}
PARAMETERS = 64  # in a shared launch; of small ones there may be many more
KEYS = ("k0", "k1", "h0", "h1", "flip", "pairs", "odd", "groups", "inside", "gate_k0", "gate_k1", "up_k0", "up_k1")


def sizes_of(kernel: str, function: str, constants: dict[str, Any]) -> tuple[dict[str, int], tuple[int, ...]]:
    """Integers by name, and the grid."""
    flat, tile, group = (constants.get(name, 0) for name in ("FLAT", "TILE", "GROUP"))
    if kernel == "quantize":
        last = TOKENS * 4096 if flat else 4095
        per_row = -(-last // group)
        groups = per_row if flat else per_row * TOKENS
        return {"last": last, "stride": 3 * last, "per_row": per_row, "n_groups": groups}, (-(-groups // tile),)
    if kernel == "glu":
        width = 14336 if flat else 14335
        strides = dict.fromkeys(("grad_stride", "gate_stride", "up_stride"), 2 * width)
        groups = 112 * TOKENS
        return {"width": width, "per_row": 112, "n_groups": groups, **strides}, (groups // tile,)
    if kernel == "operands":
        matrix = {"m": TOKENS, "k": 14336, "row_stride": 2 * 14336, "column_stride": TOKENS, "width": TOKENS}
        return matrix, (-(-(TOKENS if function == "rows_kernel" else 14336) // 32),)
    if kernel == "rmsnorm":
        if function == "sum_parts_kernel":
            return {"count": constants["PARTS"], "n": 4096}, (128,)
        parts = 1024
        more = {"rows": TOKENS, "each": TOKENS // parts, "dy_stride": 3 * 4096, "d_total_stride": 3 * 4096}
        return ROW | more, (parts if function == "backward_kernel" else TOKENS,)
    if kernel == "apollo":
        if function == "scale_kernel":
            per_channel = constants["CHANNELS"] > 1
            channels, width = (2**18, 2**14) if per_channel else (1, 2**32)
            strides = {"channel_stride": width, "width_stride": channels}
            return {"channels": channels, "width": width, **strides}, (channels // constants["CHANNELS"], PARAMETERS)
        tiles = MATRIX["m"] * MATRIX["n"] // 1024
        programs = {"norm_kernel": 512, "growth_kernel": PARAMETERS}.get(function, tiles)
        return MATRIX | {"tiles": tiles, "count": 512}, (programs, PARAMETERS)
    if function in ("steps_kernel", "check_kernel"):
        return {}, (100_000, 1024)
    if function == "check_one_kernel":
        return {"n": TWICE}, (1024,)
    return {"n": TWICE, "first_value": TWICE}, (TWICE // 2048, PARAMETERS)


def code_of(case: Any, sizes: dict[str, int], constants: dict[str, Any]) -> str:
    """Triton's code of a kernel that is launched with such sizes, functions inlined."""
    import triton
    from triton._C.libtriton import ir
    from triton.compiler.compiler import make_backend

    from parts.kernel_targets.ahead import TARGETS

    wide = {
        name: "i64" if sizes.get(name, 0) >= 2**31 else kind.removesuffix(":16")
        for name, kind in case.signature.items()
    }
    kinds = {name: wide.get(name, "constexpr") for name in case.function.arg_names}
    source: Any = triton.compiler.ASTSource(case.function, kinds, constants, {})
    target = TARGETS["cuda:90"]
    backend: Any = make_backend(target)
    options = backend.parse_options({"num_warps": case.warps, "enable_fp_fusion": False, **source.parse_options()})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    helpers = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(target, options, *helpers, context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    return str(stages["ttir"](module, {}))


def faults(case: Any) -> Iterator[tuple[str, list[str]]]:
    """(variant, lines) for each variant of a kernel's case: `FLAT` and not."""
    for flat in (True, False) if "FLAT" in case.constants else (None,):
        constants = case.constants | ({} if flat is None else {"FLAT": flat})
        sizes, grid = sizes_of(case.kernel, case.function.fn.__name__, constants)
        integers = [name for name, kind in case.signature.items() if kind.startswith("i")]
        if missing := set(integers) - set(sizes) - set(KEYS):
            raise ValueError(f"{case.kernel}, {case.label}: how large {missing} may be is not said here")
        arguments = {
            place: Span(sizes[name], sizes[name], 64 if sizes[name] >= 2**31 else 32)
            for place, name in enumerate(n for n in case.function.arg_names if n in case.signature)
            if name in integers and name in sizes
        }
        code = code_of(case, {name: sizes[name] for name in integers if name in sizes}, constants)
        yield f"{case.label}{'' if flat is None else f' FLAT={flat}'}", too_large(code, arguments, (*grid, 1, 1))


def main(every: bool) -> None:
    """Print what is found in all kernels, or in one case of each function; the last line is the number of variants."""
    sys.path.insert(0, str(ROOT / "scripts" / "bench"))
    from parts.kernel_targets.ahead import compile_cases

    seen: dict[tuple[str, str], int] = {}
    for case in compile_cases():
        key = case.kernel, case.function.fn.__name__
        if key in seen and not every:
            continue
        for variant, lines in faults(case):
            seen[key] = seen.get(key, 0) + 1
            for line in lines:
                print(f"{case.kernel}, {variant}: {line}")
    print(sum(seen.values()))


if __name__ == "__main__":
    main("all" in sys.argv)
