"""Who takes a fused step and who the loop, and what is said of it: methods, codecs, layouts, devices, compilers."""

import pytest
import torch
from torch import nn

from hf_lowmem.kernels import registry
from hf_lowmem.kernels.registry import has_numba
from hf_lowmem.optim import fused
from tests.kernels.steps import assert_same, make, parameters, run

pytestmark = pytest.mark.usefixtures("small_ones_are_compressed")


@pytest.mark.parametrize("name", ["lamb", "soap"])
def test_methods_without_a_kernel_are_not_touched(name: str) -> None:
    results = []
    for impl in ("reference", "triton"):
        params = parameters(torch.float32)[1:4]
        results.append(run(name, impl, range(2), torch.float32, params))
    assert_same(*results)


@pytest.mark.parametrize("codec", ["int4", "fp8", "bf16"])
def test_codecs_without_a_kernel_take_the_loop(codec: str, launched: list[int]) -> None:
    params = parameters(torch.float32)[:2]
    run("adamw", "triton", range(2), torch.float32, params, state=codec)
    assert not launched


UNFUSED = {
    "int4": ({"state": "int4"}, 0, "stored as int4", "8bit"),
    "bf16 and fp8": ({"state": "bf16,fp8"}, 0, "stored as bf16 and fp8", "int8"),
    "strided weights": ({}, 5, "not contiguous", "p.data.contiguous()"),
}


@pytest.mark.parametrize("case", UNFUSED)
def test_what_takes_the_loop_is_said_once_with_the_remedy(case: str, caplog: pytest.LogCaptureFixture) -> None:
    settings, at, reason, remedy = UNFUSED[case]
    fused._warn.cache_clear()
    params = [parameters(torch.float32)[at], parameters(torch.float32)[1]]
    run("adamw", "auto", range(1), torch.float32, params, **settings)
    assert not caplog.text, "on a CPU nothing is fused, and nothing is lost"
    run("adamw", "triton", range(2), torch.float32, params, **settings)
    assert caplog.text.count(reason) == 1
    assert remedy in caplog.text


def test_a_gradient_in_float64_is_what_the_reason_says(caplog: pytest.LogCaptureFixture) -> None:
    fused._warn.cache_clear()
    params = parameters(torch.float32)[:2]
    run("adamw", "triton", range(2), torch.float32, params, grad_dtype=torch.float64)
    assert caplog.text.count("its gradient is torch.float64") == 1
    assert "Keep gradients in" in caplog.text


def test_weights_that_fsdp2_has_cut_are_said(caplog: pytest.LogCaptureFixture) -> None:
    fused._warn.cache_clear()
    p = parameters(torch.float32)[0]
    optimizer = make("adamw", [p])
    found = optimizer.slot(p, optimizer.param_groups[0])
    found.sharded = True  # type: ignore[misc]
    for _ in range(2):
        fused.warn_unfused("adamw", p, found)
    assert caplog.text.count("cut by FSDP2") == 1
    assert "Use DDP" in caplog.text


def test_nothing_is_said_where_the_kernel_runs(caplog: pytest.LogCaptureFixture) -> None:
    fused._warn.cache_clear()
    for name in ("adamw", "apollo", "lamb"):
        run(name, "triton", range(1), torch.bfloat16, parameters(torch.bfloat16)[:5], state="8bit")
    assert not caplog.text


def test_nothing_is_fused_on_a_cpu_unless_it_is_asked_for(launched: list[int]) -> None:
    params = [nn.Parameter(p.detach().cpu()) for p in parameters(torch.float32)]
    run("adamw", "auto", range(1), torch.float32, params)
    assert not launched


@pytest.mark.skipif(not has_numba(), reason="numba is not installed: pip install 'hf-lowmem[cpu]'")
@pytest.mark.parametrize("weights", ["keep", "bf16_sr"])
@pytest.mark.parametrize("name", ["adamw", "lion", "galore"])
def test_who_has_no_compiler_gets_the_same_bits_on_a_cpu(
    name: str, weights: str, monkeypatch: pytest.MonkeyPatch, launched_on_cpu: list[int]
) -> None:
    """With nothing forced: of 200,000 values a sixth would show a root that is not correctly rounded."""
    results = []
    for installed in (True, False):
        monkeypatch.setattr(registry, "has_numba", lambda found=installed: found)
        dtype = torch.float32 if weights == "keep" else torch.bfloat16
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in (200_001, 3_000, 7)]
        optimizer = make(name, params, state="8bit", weights=weights)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).mul_(1e-3).to(dtype)
            optimizer.step()
        results.append(optimizer)
    assert_same(*results)
    assert launched_on_cpu[-3:] == [2, 2, 2], "the smallest keeps fp32 states, whose step torch makes"
