"""More than 2**31 values: offsets have 64 bits in Triton's code, in numba's, and in the references."""

import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch

from hf_lowmem.kernels.codecs import reference
from hf_lowmem.kernels.codecs.cases import room
from hf_lowmem.kernels.exact import random_bits
from hf_lowmem.kernels.quantize.reference import GROUPS, dequantize, quantize
from hf_lowmem.kernels.registry import has_numba
from tests.kernels.offsets import ROOT, Span, too_large

TOKENS, HIDDEN = 2**19 + 1, 4096  # 2**31 values, and a row

KERNEL = """
tt.func public @wide(%x: !tt.ptr<f32>, %n: i32) attributes {noinline = false} {
  %c = arith.constant 2048 : i32 loc(#loc1)
  %p = tt.get_program_id x : i32
  %a = arith.muli %p, %c : i32
  %w = arith.extsi %p : i32 to i64
  %d = arith.constant 2048 : i64
  %b = arith.muli %w, %d : i64
  %y = tt.addptr %x, %a : !tt.ptr<f32>, i32
  %z = tt.addptr %x, %b : !tt.ptr<f32>, i64
  %q = arith.divsi %p, %n : i32
  %m = arith.muli %q, %n : i32
  %r = arith.subi %p, %m : i32
  %s = arith.muli %r, %c : i32
  %t = tt.addptr %x, %s : !tt.ptr<f32>, i32
"""


def test_an_offset_that_wraps_is_found() -> None:
    """2**20 programs of 2,048 values are 2**31: too many for 32 bits, and the last of them is one too few."""
    assert too_large(KERNEL, {1: Span(32, 32, 32)}, (2**20 + 1, 1, 1)) == ["%y = tt.addptr %x, %a : !tt.ptr<f32>, i32"]
    assert too_large(KERNEL, {1: Span(32, 32, 32)}, (2**20, 1, 1)) == []


@pytest.mark.train  # starts a process
@pytest.mark.parametrize("which", ["first", pytest.param("all", marks=pytest.mark.slow)])
def test_no_kernels_offset_wraps(which: str) -> None:
    """Of 2**32 activations and 2**33 states; `all`: of each function, every variant that is compiled ahead."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.offsets", which]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    *found, count = done.stdout.splitlines()
    assert found == []
    assert int(count) > (100 if which == "all" else 20)


@pytest.mark.parametrize(("fmt", "hidden", "seed"), [("e4m3", HIDDEN, 2**62 + 1), ("int8", HIDDEN - 1, None)])
def test_references_take_as_many(fmt: str, hidden: int, seed: int | None) -> None:
    x = torch.empty((TOKENS, hidden), dtype=torch.bfloat16, device="meta")
    codes, scales = quantize(x, fmt, seed)
    assert (codes.shape, scales.shape) == (x.shape, (TOKENS, GROUPS[fmt].groups(hidden)))
    assert dequantize(codes, scales, fmt, torch.bfloat16).shape == x.shape


@pytest.mark.parametrize("edge", [2**31, 2**32, 2**33])
def test_random_bits_go_on_beyond_an_edge(edge: int) -> None:
    """An index counts modulo 2**32, wherever a part begins."""
    device = torch.device("cpu")
    whole = random_bits(7, edge - 3, edge + 3, device)
    parts = [random_bits(7, edge - 3, edge, device), random_bits(7, edge % 2**32, edge % 2**32 + 3, device)]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.train
@pytest.mark.skipif(not has_numba(), reason="numba is not installed: pip install 'hf-lowmem[cpu]'")
@pytest.mark.parametrize("codec", ["int8", pytest.param("fp8_expand", marks=pytest.mark.slow)])
def test_a_cpus_kernels_reach_the_last_tile(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2**31 values and a few, of which only the last tiles are touched: the rest is never given memory."""
    cpu = import_module("hf_lowmem.kernels.codecs.cpu")
    monkeypatch.setattr(cpu, "in_parts", lambda run, tiles: run(tiles - 2, tiles))
    values, last = 2**31 + 5, 512  # whole blocks before the last ones, and a ragged one
    state = torch.empty(values, dtype=torch.float32)
    state[-last:] = torch.randn(last, generator=torch.Generator().manual_seed(0))
    state[-4096:-last] = 0
    codes, scalars = room(codec, torch.Size([values]), True, torch.device("cpu"))
    cpu.encode_state(state, codes, scalars, codec, True, 5, 0)
    decoded = cpu.decode_state(codes, scalars, codec, True)
    start = values // 256 * 256 - 256
    small, few = room(codec, torch.Size([values - start]), True, torch.device("cpu"))
    reference.encode_state(state[start:].clone(), small, few, codec, True, 5, start)
    assert torch.equal(codes[start:], small)
    assert torch.equal(decoded[start:], reference.decode_state(small, few, codec, True))
