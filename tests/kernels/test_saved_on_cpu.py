"""The CPU's kernels of saved activations beyond the contract's small cases: threads, long rows, other dtypes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowmem.kernels import KERNELS, use_kernels
from hf_lowmem.kernels.registry import has_numba

pytestmark = [
    pytest.mark.train,
    pytest.mark.skipif(not has_numba(), reason="numba is not installed: pip install 'hf-lowmem[cpu]'"),
]

# Widths around a tile of 1,024 values and a group of 128 or 32, with so many values that several threads share them.
SHAPES = [(300, 1152), (301, 1000), (41, 5003), (70000, 1), (2100, 32), (5, 16384)]


def calls(rows: int, width: int, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Arguments of each kernel."""
    made = torch.Generator().manual_seed(rows + width)
    x, dy, more = (torch.randn(rows, width, generator=made).to(dtype) for _ in range(3))
    weight = torch.randn(width, generator=made).to(dtype)
    with use_kernels("reference"):
        codes, scales = KERNELS["quantize"](x, "e4m3", None)
        whole, steps = KERNELS["quantize"](x, "int8", 7)
    return {
        "quantize": (x, "e4m3", 5),
        "dequantize": (whole, steps, "int8", dtype),
        "rmsnorm": (x, weight, more, 1e-6, False, True, 5),
        "rmsnorm_again": (codes, scales, weight, 1e-6, True, False, dtype),
        "rmsnorm_backward": (dy, codes, scales, weight, more, 1e-6, False, dtype, True),
        "glu_save": (x, dy, "silu", 5, 6),
        "glu": (codes, codes, scales, scales, "gelu_tanh", dtype),
        "glu_backward": (dy, codes, codes, scales, scales, "silu", dtype),
    }


def results(name: str, args: tuple[Any, ...], impl: str) -> list[Tensor]:
    with use_kernels(impl), torch.no_grad():
        found = KERNELS[name](*args)
    return [found] if isinstance(found, Tensor) else list(found)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_any_length_and_any_number_of_threads(shape: tuple[int, int], dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    for name, args in calls(*shape, dtype).items():
        want = results(name, args, "reference")
        for threads in (1, 3):
            torch.set_num_threads(threads)
            try:
                got = results(name, args, "cpu")
            finally:
                torch.set_num_threads(before)
            for i, (g, w) in enumerate(zip(got, want, strict=True)):
                torch.testing.assert_close(g, w, rtol=0, atol=0, msg=f"{name}, tensor {i}, {threads} threads")


@pytest.mark.parametrize("name", ["quantize", "rmsnorm", "glu_save"])
def test_inputs_of_any_strides(name: str) -> None:
    args = calls(96, 256, torch.float32)[name]
    strided = tuple(a.t().contiguous().t() if isinstance(a, Tensor) and a.dim() == 2 else a for a in args)
    for got, want in zip(results(name, strided, "cpu"), results(name, args, "cpu"), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_dtype_that_is_only_named_is_left_to_the_reference(dtype: torch.dtype) -> None:
    codes, scales = calls(4, 256, torch.float32)["rmsnorm_again"][:2]
    args = codes, scales, "e4m3", dtype
    assert KERNELS["dequantize"].pick(*args) is KERNELS["dequantize"].reference
    with use_kernels("cpu"), pytest.raises(RuntimeError, match="it knows no float16 and no float64"):
        KERNELS["dequantize"](*args)
