"""Group quantisation as formats use it: one operator a tensor, any seed, strides, compiled; one copy of nothing."""

import math

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_lowmem.activations.formats import compress, decompress
from hf_lowmem.kernels import use_kernels
from hf_lowmem.kernels.quantize import DEQUANTIZE, GROUPS, QUANTIZE
from hf_lowmem.kernels.quantize import triton as on_device
from hf_lowmem.kernels.quantize.cases import values

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def roundtrip(x: Tensor, fmt: str, seed: int | None) -> Tensor:
    return decompress(compress(x, fmt, seed=seed), fmt, x.shape, x.dtype)


@pytest.mark.parametrize("fmt", GROUPS)
@pytest.mark.parametrize("seed", [None, 7])
def test_formats_run_on_triton(fmt: str, seed: int | None) -> None:
    x = values((3, 5, 200), torch.bfloat16, DEVICE)
    with use_kernels("reference"):
        want = roundtrip(x, fmt, seed)
    with use_kernels("triton"):
        assert torch.equal(roundtrip(x, fmt, seed), want)


@pytest.mark.parametrize("fmt", GROUPS)
def test_a_tensor_is_one_operator_however_large(fmt: str) -> None:
    class Seen(TorchDispatchMode):
        names: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
            self.names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    x = torch.zeros(1 << 19, device=DEVICE)  # four spans on one thread of a CPU
    with Seen() as seen:
        roundtrip(x, fmt, None)
    kernels = [name for name in seen.names if "quantize" in name]
    assert kernels == ["quantize.default", "dequantize.default"]


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63, 2**64 - 1, 2**70 + 3])
def test_any_integer_is_a_seed(seed: int) -> None:
    """Only its lower 64 bits count, so 2**64 more is the same seed."""
    x = values((4, 128), torch.bfloat16, DEVICE)
    first, same, other = (compress(x, "e4m3", seed=s)[0] for s in (seed, seed + 2**64, seed + 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("fmt", GROUPS)
def test_rows_are_read_where_they_lie(fmt: str) -> None:
    """Columns of a wider tensor and whole contiguous tensors are not copied; what has no one stride a row is."""
    groups = GROUPS[fmt]
    wide = torch.zeros(4, 6, 512, device=DEVICE)
    for x, last, stride in (
        (wide, wide.numel(), wide.numel()),
        (wide[..., 128:384], 256, 512),
        (wide[..., :200], 200, 512),
        (wide[:, :, :200].contiguous(), 200, 200),
    ):
        rows, *sizes = on_device.rows_of(x, groups)
        assert rows.data_ptr() == x.data_ptr()
        assert sizes == [last, stride]
    for x in (wide.transpose(0, 1), wide[..., ::2], wide.transpose(1, 2)):
        rows, last, stride = on_device.rows_of(x, groups)
        assert rows.data_ptr() != x.data_ptr()
        assert torch.equal(rows.flatten(), x.flatten())
        assert last == stride


def test_a_spoilt_group_has_scale_nan_and_codes_zero() -> None:
    """All 254 nans of bf16 and both infinities, in either kind of group: what a nan turns into differs by device."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    bad = bits[~bits.isfinite()].to(DEVICE)
    assert bad.numel() == 256
    for fmt, groups in GROUPS.items():
        x = torch.ones(256, groups.group, dtype=torch.bfloat16, device=DEVICE)
        x[torch.arange(256), torch.arange(256) % groups.group] = bad
        for impl in ("reference", "triton"):
            for seed in (None, 3):
                with use_kernels(impl):
                    codes, scales = compress(x, fmt, seed=seed)
                assert not codes.any()
                assert scales.isnan().all()
                assert decompress((codes, scales), fmt, x.shape, x.dtype).isnan().all()


@pytest.mark.parametrize("fmt", GROUPS)
def test_every_bf16_survives_as_torch_would_have_it(fmt: str) -> None:
    """A scale of exactly 1, so that the codes are torch's own casts of all bf16 within the format's range."""
    groups = GROUPS[fmt]
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    fits = bits[bits.float().abs() <= groups.top].to(DEVICE)
    pad = -fits.numel() % (groups.group - 1)
    rows = torch.nn.functional.pad(fits, (0, pad)).view(-1, groups.group - 1)
    x = torch.cat([torch.full_like(rows[:, :1], groups.top), rows], 1)
    y = x.float()
    want = y.to(torch.float8_e4m3fn).view(torch.uint8) if fmt == "e4m3" else y.round().to(torch.int8)
    for impl in ("reference", "triton"):
        with use_kernels(impl):
            codes, scales = compress(x, fmt)
        assert (scales == 1).all()
        assert torch.equal(codes, want)


@pytest.mark.train
def test_compiled_by_inductor_in_one_graph_whatever_the_seed() -> None:
    """The seed is an argument of the operator: another one is no other graph."""
    torch.compiler.reset()
    count = CompileCounterWithBackend("inductor")
    compiled = torch.compile(roundtrip, fullgraph=True, dynamic=True, backend=count)
    x = values((6, 256), torch.bfloat16, DEVICE).mT.contiguous().mT
    for seed in (5, 2**40 + 1, 2**62 + 1):
        assert torch.equal(compiled(x, "int8", seed), roundtrip(x, "int8", seed))
    assert count.frame_count == 1


def test_fake_tensors_pass_through_triton_too() -> None:
    """Nothing is launched for them, whichever implementation is forced."""
    with use_kernels("triton"), FakeTensorMode():
        x = torch.empty(3, 7, 200)
        codes, scales = QUANTIZE(x, "e4m3", None)
        assert (codes.shape, scales.shape) == ((3, 7, 200), (3, 7, math.ceil(200 / 128)))
        assert DEQUANTIZE(codes, scales, "e4m3", torch.float16).dtype is torch.float16
