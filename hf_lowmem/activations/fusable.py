"""Norms and gated MLPs that a kernel can stand in for, found out by trying, and when it does.

A kernel knows one formula, and a model's module is code. Neither its class nor its name says what that computes, so a
copy of the module is run: a norm with a weight of ours on a few rows, against the formula's variants, in three
combinations of dtypes, as families differ in where they round; an MLP with stubs for its parts, which take down what
they were called with, so that `down(act(gate(x)) * up(x))` is read off from identities and not from attribute names.
What does not come out as the formula says, to the last roundings, is left to the module itself.

No weight is read: meta, sharded and quantised ones do as well, and no device is waited for.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

from hf_lowmem.activations.detect import linears_of
from hf_lowmem.activations.draws import undrawn
from hf_lowmem.kernels.registry import Kernel, current_impl
from hf_lowmem.kernels.rmsnorm.reference import normalise

__all__ = ["Gated", "RMSNorm", "gated_of", "has_hooks", "is_fake", "rmsnorm_of", "settings_of", "wanted"]

# Dtypes of a norm's input and weight: what models are trained in. The second tells where a family rounds.
DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
)
VARIANTS = ((False, True), (False, False), (True, False))


@dataclass(frozen=True)
class RMSNorm:
    """A norm as hf_lowmem.kernels.rmsnorm has it; `weight`: the name of its parameter."""

    weight: str
    eps: float
    plus_one: bool
    cast_first: bool


@dataclass(frozen=True)
class Gated:
    """down(act(gate(x)) * up(x)): names of submodules. `up` is "" where one linear makes both, `act` first or second.

    kind: of hf_lowmem.kernels.glu.ACTIVATIONS.
    """

    gate: str
    up: str
    act: str
    down: str
    kind: str
    gate_first: bool = True


def wanted(kernel: Kernel, *args: Any) -> bool:
    """Whether to go by way of the kernel: where Triton can run it, or one implementation is forced.

    On a CPU modules run as HuggingFace made them, with and without a compiler for kernels: a loss has the same bits.
    """
    on_cpu = any(isinstance(arg, Tensor) and arg.device.type == "cpu" for arg in args)
    return current_impl() != "auto" or not (on_cpu or kernel.unsupported(*args))


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to see, or change, what goes through this module."""
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(own) or bool(hooks_of_all._global_backward_hooks) or bool(hooks_of_all._global_backward_pre_hooks)


def settings_of(module: nn.Module) -> tuple[Any, ...]:
    """A module's class and its numbers, flags and names: a formula was read off with these and no others."""
    own = ((name, value) for name, value in vars(module).items() if isinstance(value, bool | int | float | str))
    return (type(module), *(pair for pair in own if pair[0] != "training"))


def rmsnorm_of(module: nn.Module) -> RMSNorm | None:
    """The RMSNorm that a module computes in every combination of DTYPES; None where it computes anything else.

    Its eps is the one of its float attributes that fits; the mean square of the second row is of eps's size, so that
    eps shows in the result.
    """
    named = list(module.named_parameters(recurse=False))
    if len(named) != 1 or named[0][1].ndim != 1 or any(True for _ in module.children()) or is_fake():
        return None
    name, n = named[0][0], named[0][1].numel()
    g = torch.Generator().manual_seed(0)
    weight = 1 + 0.2 * torch.randn(n, generator=g, device="cpu", dtype=torch.float32)
    x = torch.randn(3, n, generator=g, device="cpu", dtype=torch.float32)
    numbers = {v for v in vars(module).values() if isinstance(v, float) and 0 < v < 0.1}
    for eps in numbers:
        rows = torch.stack([x[0], x[1] * eps**0.5, x[2] * 20])
        for plus_one, cast_first in VARIANTS:
            found = RMSNorm(name, eps, plus_one, cast_first)
            if all(_computes(module, found, rows.to(a), weight.to(b)) for a, b in DTYPES):
                return found
    return None


@torch.no_grad()
def _computes(module: nn.Module, norm: RMSNorm, x: Tensor, weight: Tensor) -> bool:
    """Whether both agree up to the order of a sum: 1e-5 in fp32; in bf16 all values but one in a hundred, at ties."""
    twin = copy.copy(module)
    vars(twin)["_parameters"] = {norm.weight: nn.Parameter(weight, requires_grad=False)}
    vars(twin)["training"] = True
    try:
        ours = normalise(x.float(), weight, norm.eps, norm.plus_one, norm.cast_first, x.dtype)
        with undrawn(x.device):
            theirs = type(module).forward(twin, x.clone())
    except Exception:
        return False
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        return False
    if x.dtype == torch.float32:
        return torch.allclose(theirs, ours, rtol=1e-5, atol=1e-7)
    close = torch.allclose(theirs.float(), ours.float(), rtol=2.0**-7, atol=0)
    if ours.dtype == torch.float32:  # the same rounded value, times an fp32 weight
        theirs, ours = theirs / weight, ours / weight
        return close and (~torch.isclose(theirs, ours, rtol=1e-5)).float().mean().item() < 0.01
    return close and (theirs != ours).float().mean().item() < 0.01


def gated_of(mlp: nn.Module) -> Gated | None:
    """The parts of a gated MLP; None where the module's forward computes anything else."""
    linears = list(linears_of(mlp))
    acts = {name: kind for name, child in mlp.named_children() if (kind := activation_of(child))}
    if len(linears) not in (2, 3) or not acts or is_fake():
        return None
    try:
        return _read_off(mlp, linears, acts)
    except Exception:
        return None


@torch.no_grad()
def activation_of(module: nn.Module) -> str:
    """ "silu" or "gelu_tanh" if the module is that function of its input, else ""."""
    if any(True for _ in module.parameters()) or any(True for _ in module.children()) or is_fake():
        return ""
    x = torch.linspace(-12, 12, 97, device="cpu", dtype=torch.float32)
    twin = copy.copy(module)
    vars(twin)["training"] = True
    try:
        with undrawn(x.device):
            y = type(module).forward(twin, x.clone())
    except Exception:
        return ""
    known = {"silu": F.silu(x), "gelu_tanh": F.gelu(x, approximate="tanh")}
    same = (kind for kind, want in known.items() if isinstance(y, Tensor) and y.shape == x.shape)
    return next((kind for kind in same if torch.allclose(y, known[kind], rtol=1e-6, atol=1e-6)), "")


class _Stub(nn.Module):
    """A submodule's replacement that records the inputs of its calls and returns random values."""

    def __init__(self, name: str, calls: list[tuple[str, Tensor, Tensor]], width: Callable[[Tensor], int]) -> None:
        super().__init__()
        self.name, self.calls, self.width = name, calls, width

    def forward(self, x: Tensor) -> Tensor:
        g = torch.Generator().manual_seed(len(self.calls) + 1)
        out = torch.randn((*x.shape[:-1], self.width(x)), generator=g, device="cpu", dtype=torch.float32)
        self.calls.append((self.name, x, out))
        return out


@torch.no_grad()
def _read_off(mlp: nn.Module, linears: list[str], acts: dict[str, str]) -> Gated | None:
    calls: list[tuple[str, Tensor, Tensor]] = []
    stubs = {name: _Stub(name, calls, lambda x: 8) for name in linears}
    # Any other part is one too many, even a dropout that does nothing today.
    stubs |= {
        name: _Stub(name, calls, lambda x: x.shape[-1]) for name, _ in mlp.named_children() if name not in linears
    }
    twin = copy.copy(mlp)
    vars(twin)["_modules"] = stubs
    vars(twin)["training"] = True
    x = torch.randn((1, 3, 8), generator=torch.Generator().manual_seed(0), device="cpu", dtype=torch.float32)
    with undrawn(x.device):
        y = type(mlp).forward(twin, x)
    made = {name: (given, out) for name, given, out in calls}
    if len(made) != len(calls) or len(calls) != len(linears) + 1:
        return None
    down = next((name for name in linears if made[name][1] is y), None)
    act = next(name for name in acts if name in made)
    before = [name for name in linears if name != down]
    if down is None or any(made[name][0] is not x for name in before):
        return None
    gate_in, act_out = made[act]
    if len(before) == 2:
        gate = next((name for name in before if made[name][1] is gate_in), None)
        if gate is None:
            return None
        up = before[1 - before.index(gate)]
        found, factor = Gated(gate, up, act, down, acts[act]), made[up][1]
    else:
        halves = made[before[0]][1].chunk(2, -1)
        first = torch.equal(gate_in, halves[0])
        if not first and not torch.equal(gate_in, halves[1]):
            return None
        found, factor = Gated(before[0], "", act, down, acts[act], first), halves[1 if first else 0]
    return found if torch.equal(made[down][0], act_out * factor) else None


def is_fake() -> bool:
    """Whether new tensors have no values, as under FakeTensorMode: then no module can be tried."""
    return type(torch.empty(0, device="cpu")) is not Tensor
