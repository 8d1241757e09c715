"""RMSNorm and gated units: their mathematics in float64, their rounding, their gradients, what they keep.

That Triton gives the references' bits is held by tests/kernels/test_contract.py, for these as for all kernels.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from hf_lowmem.activations import compress, decompress
from hf_lowmem.kernels import use_kernels
from hf_lowmem.kernels.glu import ACTIVATIONS, GLU, GLU_SAVE, glu_rows
from hf_lowmem.kernels.glu import reference as glu_reference
from hf_lowmem.kernels.rmsnorm import RMSNORM, RMSNORM_AGAIN, rmsnorm_rows
from hf_lowmem.kernels.rmsnorm import reference as norm_reference
from hf_lowmem.memory import measure_saved

EPS = 1e-6
BF16, FP16 = torch.bfloat16, torch.float16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ULP = 2.0**-24  # the error of one rounding to fp32, relative
VARIANTS = {"llama": (False, True), "olmo2": (False, False), "gemma": (True, False)}
MODULES: dict[str, Any] = {"llama": LlamaRMSNorm, "olmo2": Olmo2RMSNorm, "gemma": Gemma3RMSNorm}


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, spread: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread).to(dtype)


def rmsnorm(
    x: Tensor, weight: Tensor, plus_one: bool = False, cast_first: bool = True, seed: int | None = None
) -> Tensor:
    """Over the last dimension; of x its codes are kept."""
    rows = x.reshape(-1, x.shape[-1])
    return rmsnorm_rows(rows, weight, EPS, plus_one, cast_first, seed)[0].view(x.shape)


def glu(gate: Tensor, up: Tensor, act: str, *, save: bool = True) -> Tensor:
    """Over the last dimension; of gate and up their codes are kept, without `save` they themselves."""
    one, other = (t.reshape(-1, t.shape[-1]) for t in (gate, up))
    out = glu_rows(one, other, act, (None, None))[0] if save else GLU(one, other, None, None, act, gate.dtype)
    return out.view(gate.shape)


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, plus_one: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.plus_one = plus_one
        return norm_reference.normalise(x, weight, EPS, plus_one, not plus_one, x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        dx, terms = norm_reference.normalise_backward(dy, x, weight, EPS, ctx.plus_one)
        return dx, norm_reference.sum_rows(terms), None


class Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return glu_reference.product(gate, up, act, gate.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        return *glu_reference.gradients(grad, gate, up, ctx.act), None


@pytest.mark.parametrize("plus_one", [False, True])
def test_gradients_of_the_norm_are_its_derivatives(plus_one: bool) -> None:
    x, weight = (randn(*s, dtype=torch.float64, seed=len(s)).requires_grad_() for s in ((19, 7), (7,)))
    assert torch.autograd.gradcheck(lambda *t: Norm.apply(*t, plus_one), (x, weight))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradients_of_gated_units_are_their_derivatives(act: str) -> None:
    gate, up = (randn(5, 9, dtype=torch.float64, seed=s, spread=3).requires_grad_() for s in (0, 1))
    assert torch.autograd.gradcheck(lambda *t: Gate.apply(*t, act), (gate, up))


def test_formulas_are_torchs_in_float64() -> None:
    x, weight, up = randn(6, 33, dtype=torch.float64), randn(33, dtype=torch.float64), randn(6, 33, dtype=torch.float64)
    y = norm_reference.normalise(x, weight, EPS, False, True, x.dtype)
    torch.testing.assert_close(y, F.rms_norm(x, (33,), weight, EPS), rtol=1e-13, atol=1e-13)
    for act, torchs in (("silu", F.silu(x)), ("gelu_tanh", F.gelu(x, approximate="tanh"))):
        ours = glu_reference.product(x, up, act, x.dtype)
        torch.testing.assert_close(ours, torchs * up, rtol=1e-12, atol=1e-13)


def test_the_exponential_is_as_good_as_it_says() -> None:
    for low, high in ((-86.0, 88.3), (-1.0, 1.0)):
        x = torch.linspace(low, high, 1_000_001)
        truth = torch.exp(x.double())
        assert ((glu_reference.exp(x).double() - truth).abs() / truth).max() <= 1.8 * ULP
    ends = glu_reference.exp(torch.tensor([0.0, 89.0, 1e30, math.inf, -86.5, -math.inf, math.nan]))
    assert ends[0] == 1.0
    assert ends[1:4].isinf().all()
    assert ends[4] == ends[5] == glu_reference.exp(torch.tensor(-86.0)) > torch.finfo(torch.float32).tiny
    assert ends[6].isnan()


@pytest.mark.parametrize("n", [1, 2, 3, 100, 4096])
def test_sums_by_pairs(n: int) -> None:
    """log2(n) additions lie over every term, each with half a unit in the last place of its result."""
    x = randn(4, n)
    bound = math.ceil(math.log2(max(n, 2))) * ULP * x.double().abs().sum(-1)
    assert ((norm_reference.sum_pairs(x).double() - x.double().sum(-1)).abs() <= bound).all()
    assert torch.equal(norm_reference.sum_pairs(x.T, 0), norm_reference.sum_pairs(x))


@pytest.mark.parametrize("n", [64, 4096])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_norm_is_within_its_roundings_of_the_truth(variant: str, n: int) -> None:
    """A sum of squares: one rounding a square and log2(n) over it, all of one sign; division and eps: two. The root
    halves these and adds one; its inverse, the products with x and weight, and 1 + w: four."""
    plus_one, cast_first = VARIANTS[variant]
    x, weight = randn(5, n, spread=3), 1 + randn(n, seed=1, spread=0.2)
    y = rmsnorm(x, weight, plus_one, cast_first)
    x64, w64 = x.double(), weight.double() + plus_one
    truth = x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + EPS) * w64
    assert ((y.double() - truth).abs() <= ((math.log2(n) + 3) / 2 + 5) * ULP * truth.abs()).all()


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP16, FP16), (BF16, torch.float32)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_norm_rounds_where_huggingface_does(variant: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """The same values, except where an fp32 that differs in its last bits lies at a tie: x_hat is off by 10 units of
    2**-24 at most (above), and the neighbourhoods of ties of that size hold 2 * 10 * 2**-24 / 2**-11 of all fp16: 1 %.
    """
    plus_one, cast_first = VARIANTS[variant]
    module = MODULES[variant](384, eps=EPS)
    with torch.no_grad():
        module.weight.copy_(randn(384, seed=1, spread=0.2))
    module.to(dtypes[1])
    x = randn(40, 384, dtype=dtypes[0], spread=3)
    theirs, ours = module(x), rmsnorm(x, module.weight, plus_one, cast_first)
    assert ours.dtype == theirs.dtype
    assert (ours != theirs).float().mean() < 0.01
    torch.testing.assert_close(ours, theirs, rtol=2.0**-7 if dtypes[0] == BF16 else 2.0**-10, atol=0)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_are_within_their_roundings_of_the_truth(act: str) -> None:
    """exp(-z): 1.8, and for gelu the roundings of z, at most 4, times |z|; then 1 + e and the quotient: one each."""
    x = torch.cat([torch.linspace(-40, 40, 200_001), torch.logspace(-30, 30, 1001), -torch.logspace(-30, 0, 1001)])
    value, slope = glu_reference.activate(x, act)
    x64 = x.double().requires_grad_()
    z = x64 if act == "silu" else math.sqrt(8 / math.pi) * (x64 + 0.044715 * x64**3)
    truth = x64 * torch.sigmoid(z)
    (slope_truth,) = torch.autograd.grad(truth.sum(), x64)
    units = 4 + (0 if act == "silu" else 4) * z.abs()
    inside = z > -86  # below, where the value is 1e-36, the exponential is infinite
    assert ((value - truth).abs() <= units * ULP * truth.abs())[inside].all()
    assert ((value - truth).abs() < 1e-30)[~inside].all()
    # s + value * (1 - s) * z': s is off by the roundings of 1 + e and of the quotient, and so is 1 - s, which is not
    # small then. For silu times |x|, for gelu times |x z'|: at most 36 until s is 1. Eight for the other roundings.
    assert (slope - slope_truth).abs().max() <= (2 * 36 + 8) * ULP


def test_products_round_where_torch_does() -> None:
    """As above: fp32 values within 8 * 2**-24 of each other round differently to bf16 for 2 * 8 * 2**-24 / 2**-8."""
    gate, up = randn(64, 256, dtype=torch.bfloat16, spread=3), randn(64, 256, dtype=torch.bfloat16, seed=1)
    for act, torchs in (("silu", F.silu(gate)), ("gelu_tanh", F.gelu(gate, approximate="tanh"))):
        ours, theirs = glu(gate, up, act), torchs * up
        middle = gate > -4  # in gelu's tail torch's own 1 + tanh cancels
        assert (ours != theirs)[middle].float().mean() < 0.001


def test_saved_codes_are_those_of_the_formats() -> None:
    x, up = (randn(6, 200, dtype=BF16, spread=5, seed=seed).to(DEVICE) for seed in (0, 1))
    weight = torch.ones(200, dtype=BF16, device=DEVICE)
    for seed in (None, 12345):
        for impl in ("reference", "triton"):
            with use_kernels(impl):
                by_norm = RMSNORM(x, weight, None, EPS, False, True, seed)[1:3]
                by_glu = GLU_SAVE(x, up, "silu", seed, seed)[1:]
            assert all(torch.equal(a, b) for a, b in zip(by_norm, compress(x, "e4m3", seed=seed), strict=True))
            both = (*compress(x, "e4m3", seed=seed), *compress(up, "e4m3", seed=seed))
            assert all(torch.equal(a, b) for a, b in zip(by_glu, both, strict=True))


def decoded(x: Tensor) -> Tensor:
    return decompress(compress(x, "e4m3"), "e4m3", x.shape, torch.float32).double()


def assert_close(ours: Tensor | None, truth: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """fp32: some 20 roundings over the largest term. bf16: that, rounded once."""
    assert ours is not None
    assert ours.dtype == dtype
    scale = truth.abs().max().item()
    rtol = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(ours.double(), truth, rtol=rtol, atol=20 * ULP * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_norms_gradients_are_exact_at_the_decoded_input(variant: str, dtype: torch.dtype) -> None:
    plus_one, cast_first = VARIANTS[variant]
    x, dy = randn(2, 11, 200, dtype=dtype, spread=3).requires_grad_(), randn(2, 11, 200, dtype=dtype, seed=2)
    weight = (1 + randn(200, seed=1, spread=0.2)).to(dtype).requires_grad_()
    rmsnorm(x, weight, plus_one, cast_first).backward(dy)

    x64, w64 = decoded(x.detach()).requires_grad_(), weight.detach().double().requires_grad_()
    F.rms_norm(x64, (200,), w64 + plus_one, EPS).backward(dy.double())
    assert x64.grad is not None
    assert w64.grad is not None
    assert_close(x.grad, x64.grad, dtype)
    assert_close(weight.grad, w64.grad, dtype)


def test_the_norm_of_a_sum() -> None:
    x, residual, weight = randn(9, 128).requires_grad_(), randn(9, 128, seed=1).requires_grad_(), torch.ones(128)
    y, _, _, total = RMSNORM(x, weight, residual, EPS, False, True, None)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, rmsnorm(x.detach() + residual.detach(), weight))
    dy, d_total = randn(9, 128, seed=2), randn(9, 128, seed=3)
    torch.autograd.backward((y, total), (dy, d_total))
    sum64 = decoded(total.detach()).requires_grad_()
    F.rms_norm(sum64, (128,), weight.double(), EPS).backward(dy.double())
    assert sum64.grad is not None
    assert_close(x.grad, sum64.grad + d_total.double())
    assert_close(residual.grad, sum64.grad + d_total.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gated_units_gradients_are_exact_at_what_is_kept(act: str, save: bool, dtype: torch.dtype) -> None:
    both = randn(2, 11, 400, dtype=dtype, spread=2).requires_grad_()
    gate, up = both.chunk(2, -1)
    grad = randn(2, 11, 200, dtype=dtype, seed=2)
    glu(gate, up, act, save=save).backward(grad)

    kept = [decoded(t.detach()) if save else t.detach().double() for t in (gate, up)]
    gate64, up64 = (t.requires_grad_() for t in kept)
    activated = F.silu(gate64) if act == "silu" else F.gelu(gate64, approximate="tanh")
    (activated * up64).backward(grad.double())
    assert gate64.grad is not None
    assert up64.grad is not None
    assert_close(both.grad, torch.cat([gate64.grad, up64.grad], -1), dtype)


def test_what_was_saved_gives_the_output_again() -> None:
    """Of values that E4M3 has exactly, the output of the second pass is that of the first."""
    x = torch.tensor([1.0, -2.0, 0.5, 448.0]).repeat(3, 64)
    weight = torch.linspace(0.5, 2, 256)
    y, codes, scales, _ = RMSNORM(x, weight, None, EPS, False, True, None)
    assert torch.equal(RMSNORM_AGAIN(codes, scales, weight, EPS, False, True, x.dtype), y)
    out, gate, gate_scales, up, up_scales = GLU_SAVE(x, x, "silu", None, None)
    assert torch.equal(GLU(gate, up, gate_scales, up_scales, "silu", x.dtype), out)


def test_nothing_but_codes_is_kept() -> None:
    x, weight = (randn(32, 256) * 1.0).requires_grad_(), torch.ones(256, requires_grad=True)
    per_value = 1 + 2 / 128
    with measure_saved() as saved:
        y = rmsnorm(x, weight)
        norm = saved.total - weight.nbytes  # no nn.Parameter: counted
        out = glu(y, x, "silu")
        both = saved.total - weight.nbytes
    assert out.requires_grad
    assert norm == 32 * 256 * per_value
    assert both == 3 * norm


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gates_far_below_zero_shut(act: str, dtype: torch.dtype) -> None:
    """A sigmoid that ended at 4.5e-38 would let a part of them through, times a gate of 3e38."""
    exact = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}[act]
    gates = [-80.0, -86.0, -86.5, -90.0, -1e3, -6e4, *([-1e10, -1e30, -3e38] if dtype == BF16 else ())]
    gate = torch.tensor([gates + [0.0] * (128 - len(gates))], dtype=dtype)
    up = torch.full_like(gate, 8.0)
    x = gate.clone().requires_grad_()
    y = glu(x, up, act, save=False)
    (d_gate,) = torch.autograd.grad(y.sum(), x)
    least = 8 * 2e-33  # |x act(x)| of 80 is 1.4e-33
    assert (y - exact(gate.double()) * 8).abs().max() <= least
    assert d_gate[:, : len(gates)].abs().max() <= least
    for value in (-math.inf, math.nan):
        ours = GLU(torch.full_like(gate, value), up, None, None, act, dtype)
        assert ours.isnan().all() == exact(torch.tensor(value)).isnan()


class Zeros(TorchDispatchMode):
    """The bytes of the zeros that are made."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("zeros", "zeros_like", "new_zeros"):
            self.nbytes += result.nbytes
        return result


TWO = (256, 384)
USES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    # what is used of the outputs, and the bytes of zeros that stand for the gradients of those that are not
    "norm": (lambda x, w: rmsnorm(x, w), 0),
    "glu": (lambda x, w: glu(x, x * w, "silu"), 0),
    "glu kept": (lambda x, w: glu(x, x * w, "silu", save=False), 0),
    "norm of a sum, both": (lambda x, w: sum(RMSNORM(x, w, x * w, EPS, False, True, None)[::3]), 0),  # type: ignore[arg-type]
    "norm of a sum, the norm": (lambda x, w: RMSNORM(x, w, x * w, EPS, False, True, None)[0], 0),
    "norm of a sum, the sum": (lambda x, w: RMSNORM(x, w, x * w, EPS, False, True, None)[3], 4 * 256 * 384),
}


@pytest.mark.parametrize("use", USES)
def test_backward_writes_no_zeros_for_codes(use: str) -> None:
    """They have no gradient, and as large as the values are they would be zeros that nobody reads."""
    fn, expected = USES[use]
    x, weight = randn(*TWO).requires_grad_(), (1 + randn(TWO[1], seed=1)).requires_grad_()
    y = fn(x, weight)
    with Zeros() as zeros:
        gradients = torch.autograd.grad((y * randn(*TWO, seed=2)).sum(), (x, weight))
    assert zeros.nbytes == expected
    assert all(g.isfinite().all() for g in gradients)


class Nothing(torch.autograd.Function):
    """An identity that says of its input that it has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        return None


@pytest.mark.parametrize("use", USES)
def test_an_output_whose_gradient_is_none(use: str) -> None:
    x, weight = randn(*TWO).requires_grad_(), torch.ones(TWO[1], requires_grad=True)
    (Nothing.apply(USES[use][0](x, weight)).sum() + x.sum()).backward()  # type: ignore[union-attr]
    assert torch.equal(x.grad, torch.ones_like(x))  # type: ignore[arg-type]


def test_a_frozen_weight_and_an_input_without_gradient() -> None:
    x, weight = randn(4, 64), torch.ones(64)
    frozen = x.clone().requires_grad_()
    rmsnorm(frozen, weight).sum().backward()
    trained = weight.clone().requires_grad_()
    rmsnorm(x, trained).sum().backward()
    assert frozen.grad is not None
    assert trained.grad is not None
    assert weight.grad is None
    assert x.grad is None


def test_seeds_make_other_codes_and_the_same_output() -> None:
    x, weight = randn(8, 256).requires_grad_(), torch.ones(256)
    gradients = []
    for seed in (None, 1, 2, 1):
        y = rmsnorm(x, weight, seed=seed)
        assert torch.equal(y, rmsnorm(x, weight))
        gradients.append(torch.autograd.grad(y.square().sum() + y.sum(), x)[0])
    assert torch.equal(gradients[1], gradients[3])
    assert not torch.equal(gradients[1], gradients[2])
    assert not torch.equal(gradients[0], gradients[1])


@pytest.mark.parametrize("fn", [
    lambda x, w: rmsnorm(x, w),
    lambda x, w: RMSNORM(x.view(-1, 128), w, x.view(-1, 128) * 2, EPS, True, False, None)[3],
    lambda x, w: glu(x, x * w, "gelu_tanh"),
    lambda x, w: glu(x, x * w, "silu", save=False),
], ids=["norm", "norm of a sum", "glu", "glu kept"])  # fmt: skip
def test_compiles_in_one_graph_with_its_backward_pass(fn: Callable[..., Tensor]) -> None:
    torch.compiler.reset()
    results: list[Any] = []
    for run in (fn, torch.compile(fn, fullgraph=True, backend="aot_eager")):
        x, weight = randn(3, 5, 128).requires_grad_(), (1 + randn(128, seed=1)).requires_grad_()
        y = run(x, weight)
        results.append((y, *torch.autograd.grad(y.sin().sum(), (x, weight), materialize_grads=True)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_gradient_of_a_gradient_is_refused() -> None:
    x = randn(2, 64).requires_grad_()
    (g,) = torch.autograd.grad(rmsnorm(x, torch.ones(64)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="rmsnorm_backward"):
        torch.autograd.grad(g.sum(), x)
