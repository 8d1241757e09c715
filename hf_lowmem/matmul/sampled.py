"""A linear's weight gradient from a part of its tokens: WTA-CRS, arXiv 2305.15265.

dW = sum_t g_t x_t^T is all that a linear keeps its input x for. Column-row sampling keeps k of the T rows of x, each
with a weight that makes the sum right on average; winner-take-all keeps the c rows of the largest probability for
certain, and draws k - c of the others, with the c for which least is left to chance per draw:

    p_t = |x_t| / sum |x|, largest first        P_c = p_1 + ... + p_c
    c = argmin (1 - P_c) / (k - c)              weight of a drawn row = (1 - P_c) / ((k - c) p_t)

y, dX and the bias's gradient are those of the plain layer, bit for bit; dW is unbiased. Others draw with |x_t| |g_t|,
where g, which is not known before backward, is that of the last epoch's same example; here |x_t| alone decides, so that
nothing is kept from one epoch to the next. Draws are stratified, one in each of k - c equal parts of what is left.

One draw serves all linears that read the same x (q, k, v; gate, up), which keep its rows once. It is a function of the
run's seed, the linear's name, the step and x: a resumed run draws the same, and torch's generators are left alone.
What a fused attention returns, it keeps itself, so the linear after it does as ever.

What it costs, relative error of dW in one draw (see the table in hf_lowmem/matmul/README.md): about as much as leaving
the other rows out of the batch. Where a few tokens carry the gradient, |x| does not find them. fp8 codes of x, by
`lowmem_matmul` or a tier, are half of x and give dW within a few per cent.

When not to use it: first try a tier, which keeps less at a fraction of the error. It has a place where a batch is large
for its noise anyway. Never for rows with much padding: padded tokens have |x| too, and their g is zero.
"""

import hashlib
import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hf_lowmem.kernels.exact import paired_bits
from hf_lowmem.matmul.owned import by_reason
from hf_lowmem.patching import ForwardPatch, forwards_of, in_transform

__all__ = ["OwnedSamples", "SampleReport", "Sampled", "draw", "samples_of"]

# Names of nodes that hand on the same memory, and of those that keep what they return.
VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "TransposeBackward0")
ATTENTION = ("ScaledDotProduct", "FlashAttn", "VarlenAttn")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Rows(NamedTuple):
    """A sample of rows: which, their weights in the sum, and their values."""

    places: Tensor  # (k,) int64
    weights: Tensor  # (k,) fp32
    values: Tensor  # (k, K)


def draw(norms: Tensor, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Places and weights of k of the rows whose norms are given, by WTA-CRS; see the module. Never waits for a device.

    Args:
        norms: (T,), at least 0.
        k: rows to keep, from 1 to T - 1.
        seed: of the draws. The numbers are turned by the sum of the norms, so that other rows draw others.
    """
    norms = norms.double()
    total = norms.sum()
    p, order = (norms / total.clamp_min(1e-300)).sort(descending=True, stable=True)
    upto = p.cumsum(0)  # of the c largest, c from 1 on
    index = torch.arange(k, device=norms.device)
    left = (1 - upto[:k] + p[:k]).clamp_min(0)  # for c = 0, 1, ..., k - 1
    certain = (left / (k - index)).argmin().view(1)  # a number to index with would be read from the device
    rest, draws = left.index_select(0, certain), k - certain
    words = paired_bits(seed & ~1, 0, k, norms.device)
    u = (words.bitwise_right_shift(9).bitwise_and(0x7FFFFF).double() + 0.5) * 2.0**-23
    u = (u + total * 4096) % 1.0
    aim = 1 - rest + rest * (index - certain + u) / draws
    found = torch.searchsorted(upto, aim, right=True).clamp_max(len(p) - 1)
    found = torch.where(index < certain, index, torch.maximum(found, certain))
    chance = p[found]
    drawn = torch.where(chance > 0, rest / (draws * chance), 0.0)
    return order[found], torch.where(index < certain, 1.0, drawn).float()


class _Lately:
    """The sample of the input that was drawn last, while that input lives."""

    of: "weakref.ref[Tensor] | None" = None
    key: tuple[object, ...] = ()
    rows: Rows | None = None

    def get(self, x: Tensor, key: tuple[object, ...]) -> Rows | None:
        return self.rows if self.of is not None and self.of() is x and self.key == key else None

    def put(self, x: Tensor, key: tuple[object, ...], rows: Rows) -> None:
        self.of, self.key, self.rows = weakref.ref(x, self.forget), key, rows

    def forget(self, of: object = None) -> None:
        if of is None or of is self.of:
            self.of, self.rows = None, None


class Context(Protocol):
    """Place of what a linear leaves for its backward."""

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, Tensor, Tensor, Tensor]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


class SampledLinear(torch.autograd.Function):
    """x W^T + bias, which keeps a sample of the rows of x.

    Args of `apply`: x (..., K), weight (N, K), bias (N,) or None, and the places, weights and values of `Rows`.
    """

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, weight: Tensor, bias: Tensor | None, places: Tensor, weights: Tensor, values: Tensor
    ) -> Tensor:
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, places, weights, values)
        return functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (weight, places, weights, values) = grads, ctx.saved_tensors
        rows = g.reshape(-1, g.shape[-1])
        of_x = (rows @ weight).view(*g.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        drawn = (rows[places] * weights[:, None]).to(g.dtype)
        return of_x, drawn.T @ values, rows.sum(0) if ctx.needs_input_grad[2] else None, None, None, None


class Sampled(ForwardPatch):
    """`nn.Linear.forward` that keeps a sample of its input's rows, in training and where its weight is trained.

    Args:
        module: a linear that `why_not` has nothing against.
        name: of the linear in the model.
        share: of the rows that are kept.
        seed: of the run.
        lately: shared by all linears of a model.
    """

    def __init__(self, module: nn.Linear, name: str, share: float, seed: int, lately: _Lately) -> None:
        super().__init__(module)
        self.name, self.share, self.seed, self.lately, self.step = name, share, seed, lately, 0

    def __call__(self, input: Tensor) -> Tensor:
        module, x = self.module, input
        assert isinstance(module, nn.Linear)
        if not (module.training and torch.is_grad_enabled() and module.weight.requires_grad) or in_transform():
            return self.original(x)
        dtype = module.weight.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        count = x.shape[:-1].numel()
        k = math.ceil(self.share * count)
        if x.dim() < 2 or k >= count or x.dtype not in FLOATS or is_traceable_wrapper_subclass(module.weight):
            return self.original(x)
        if is_of_attention(x):
            return self.original(x)
        kept = self.rows(x, k, dtype)
        bias = None if module.bias is None else module.bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            made = SampledLinear.apply(x.to(dtype), module.weight.to(dtype), bias, *kept)
        assert isinstance(made, Tensor)
        return made

    def rows(self, x: Tensor, k: int, dtype: torch.dtype) -> Rows:
        """The sample of x: the one that a linear beside this one has drawn, or one of its own."""
        key = x._version, k, dtype, self.step
        found = self.lately.get(x, key)
        if found is None:
            self.lately.forget()
            with torch.no_grad():
                flat = x.detach().reshape(-1, x.shape[-1])
                wide = torch.float64 if x.dtype == torch.float64 else torch.float32
                norms = torch.linalg.vector_norm(flat, dim=1, dtype=wide)
                places, weights = draw(norms, k, seed_of(self.seed, self.name, self.step))
                found = Rows(places, weights.to(wide), flat[places].to(dtype))
            self.lately.put(x, key, found)
        return found


def is_of_attention(x: Tensor) -> bool:
    """Whether x is what a fused attention has returned, which it keeps itself: a sample would come on top."""
    node = x.grad_fn
    while node is not None and node.name() in VIEWS:
        node = node.next_functions[0][0]
    return node is not None and any(name in node.name() for name in ATTENTION)


def seed_of(seed: int, name: str, step: int) -> int:
    """Seed of a linear's draws in a step: a hash, so that nothing has to be kept."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {name} {step}".encode(), digest_size=8).digest(), "little") >> 2


@dataclass
class SampleReport:
    """Linears that keep a sample of their input, and those that do not.

    Attributes:
        share: of the rows that are kept.
        handled: names of the linears.
        left: name -> why.
    """

    share: float
    handled: list[str] = field(default_factory=list[str])
    left: dict[str, str] = field(default_factory=dict[str, str])

    def __str__(self) -> str:
        first = f"{len(self.handled)} linears keep {self.share:.1%} of their input's rows"
        return "\n".join([first, *by_reason("left", self.left)])


def why_not(module: nn.Module) -> str | None:
    """Why a linear keeps what it keeps; None where it can keep a sample."""
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} is no plain linear with a matrix of floats"
    if not module.weight.requires_grad:
        return "its weight is not trained, so that it keeps no input"
    if module.weight.dtype not in FLOATS:
        return f"its weight is {module.weight.dtype}"
    if vars(module).get("forward") is not None:
        return "somebody has replaced its forward"
    return None


def samples_of(linears: Mapping[str, nn.Module], share: float) -> SampleReport:
    """Report of a share on linears. The model stays as it is.

    Raises:
        ValueError: where it can do nothing.
    """
    report = SampleReport(share)
    for name, module in linears.items():
        if (why := why_not(module)) is None:
            report.handled.append(name)
        else:
            report.left[name] = why
    if not report.handled:
        name, why = next(iter(report.left.items()), ("", "no linear inside of attention or an MLP is recognised"))
        raise ValueError(
            f"lowmem_sample={share!r} has no effect on this model: {f'{name}: ' if name else ''}{why}. Leave "
            "lowmem_sample unset."
        )
    return report


class OwnedSamples:
    """Samples that can be taken off again as a whole.

    Args:
        linears: of decoder layers, by name; changed in place.
        share: of the rows that are kept.
        seed: of the run.
    """

    def __init__(self, linears: Mapping[str, nn.Module], share: float, seed: int) -> None:
        for module in linears.values():
            for patch in list(forwards_of(module)):
                if isinstance(patch, Sampled):
                    patch.take_away()  # that another owner has left
        self.report = samples_of(linears, share)
        self._ours: list[Sampled] = []
        lately = _Lately()
        for name in self.report.handled:
            module = linears[name]
            assert isinstance(module, nn.Linear)
            self._ours.append(Sampled(module, name, share, seed, lately))
            self._ours[-1].put()

    def at_step(self, step: int) -> None:
        """Say at which step of training the next forward passes are."""
        for patch in self._ours:
            patch.step = step

    def take_off(self) -> None:
        """Leave the model as it was found. Does nothing the second time."""
        for patch in self._ours:
            patch.lately.forget()
            patch.take_away()
        self._ours = []
