"""The variants of the step's kernels, for compilation ahead of time."""

from collections.abc import Sequence
from typing import Any

import triton.language as tl

from hf_lowmem.kernels.codecs.tiles import NUM_WARPS, NUMBERS
from hf_lowmem.kernels.step.triton import (
    RULES,
    check_kernel,
    check_one_kernel,
    moments_kernel,
    step_kernel,
    steps_kernel,
    warps,
)
from hf_lowmem.specs import WEIGHT_STORES

__all__ = ["check_cases", "moments_cases", "step_cases"]

_Case = tuple[str, Any, dict[str, str], dict[str, Any], int]  # label, function, signature, constants, warps

_TABLE_TYPES = {"values": "*fp32", "table": "*i32", "places": "*fp32", "powers": "*i32", "rows": "*i32"}


def check_cases() -> list[_Case]:
    """The check of many gradients and of one, which may have a norm: (label, function, signature, constants, warps)."""
    constants = {"GRADIENT": tl.bfloat16, "ALIGNED": True}
    many = "check", check_kernel, {"table": "*i64", "finite_ptr": "*i32"}, constants, NUM_WARPS
    one = {"grad": "*bf16", "finite_ptr": "*i32", "skipped": "*i64", "norm_ptr": "*fp32", "n": "i32"}
    return [many, ("check, one", check_one_kernel, one, {"NORM": True}, NUM_WARPS)]


def step_cases(rule: str, pairs: Sequence[tuple[str, str]], shared: Sequence[tuple[str, str]]) -> list[_Case]:
    """Variants to compile ahead of time, with every store and bf16 weights and gradients.

    One large parameter with each of `pairs` of codecs, and many small ones with those of `shared`.
    """
    cases: list[_Case] = []
    values = {f"{state}_{name}": kind for state in "mv" for name, kind in _TABLE_TYPES.items()}
    floats = dict.fromkeys(("x0", "x1", "x2", "x3", "decay", "step", "eps", "root"), "fp32")
    for pair in pairs:
        state = {f"m_{part}": kind for part, kind in _types(pair[0], signed=True)}
        # A rule with one state passes it twice.
        state |= {f"v_{part}": kind for part, kind in _types(pair[1], signed=rule == "lion")}
        for store in WEIGHT_STORES:
            fixed: dict[str, Any] = {
                "RULE": RULES[rule],
                "FIRST": NUMBERS[pair[0]],
                "SECOND": NUMBERS[pair[1]],
                "STORE": WEIGHT_STORES.index(store),
                "HEAVY": False,
            }
            label = f"{rule} {','.join(dict.fromkeys(pair))} {store}"
            weights = {"param": "*bf16", "grad": "*bf16", "correction": "*i8" if store == "bf16_ecc" else "*bf16"}
            one = {"finite_ptr": "*i32"} | weights | state | values | {"n": "i32:16"} | floats
            keys = dict.fromkeys(("k0", "k1", "h0", "h1", "flip", "first_value"), "i32")
            cases.append((label, step_kernel, one | keys, fixed | {"EVEN": True, "ALIGNED": True}, warps(*pair)))
            kinds = {"WEIGHT": tl.bfloat16, "GRADIENT": tl.bfloat16, "ALIGNED": True, "WHOLE": True}
            many = {"table": "*i64", "finite_ptr": "*i32"} | values
            if pair in shared:
                cases.append((f"{label}, many", steps_kernel, many, fixed | kinds, warps(*pair)))
    return cases


def moments_cases(pairs: Sequence[tuple[str, str]]) -> list[_Case]:
    """Both kernels of projected gradients for `pairs` of codecs, of whole tiles."""
    values = {f"{state}_{name}": kind for state in "mv" for name, kind in _TABLE_TYPES.items()}
    pointers = {"table": "*i64", "finite_ptr": "*i32", "projected": "*fp32", "direction": "*fp32"}
    numbers = {"n": "i32:16"} | dict.fromkeys(("x0", "x1", "x2", "x3", "eps"), "fp32")
    cases = []
    for pair in pairs:
        fixed = {"FIRST": NUMBERS[pair[0]], "SECOND": NUMBERS[pair[1]], "ALIGNED": True, "EVEN": True}
        for label, write in (("direction", False), ("moments", True)):
            name = f"{label} {','.join(dict.fromkeys(pair))}"
            cases.append((name, moments_kernel, pointers | values | numbers, fixed | {"WRITE": write}, warps(*pair)))
    return cases


def _types(codec: str, *, signed: bool) -> list[tuple[str, str]]:
    scale = "*bf16" if codec == "int8_softsign" and signed else "*fp32"
    codes = "*fp32" if codec == "fp32" else "*u8"
    return [("codes", codes), ("scale", scale), ("power", "*u8" if codec == "fp8_expand" else scale)]
