"""hooks_fp8: what is compressed, what stays, one tensor once, nothing kept alive, and how large the error can be."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

from hf_lowmem.activations.formats import compress, decompress, nbytes
from hf_lowmem.activations.hooks import _Codes, _Packer, _Saved, wrap_module
from hf_lowmem.activations.values import AsIs
from hf_lowmem.memory import measure_saved
from tests.activations.wrapped_models import assert_same, llama, step


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


def packer(like: int | None = None, *, fmt: str = "e4m3", min_numel: int = 0) -> _Packer:
    return _Packer(fmt, min_numel, like, None)


def rounded(x: Tensor) -> Tensor:
    return decompress(compress(x, "e4m3"), "e4m3", x.shape, x.dtype)


class Calls(nn.Module):
    """A module whose forward is a function of its parameters and its input."""

    def __init__(self, run: Callable[..., Any], **parameters: Tensor) -> None:
        super().__init__()
        self.run = run
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value.detach().clone()))

    def forward(self, *inputs: Any) -> Any:
        return self.run(self, *inputs)


@pytest.mark.parametrize(("kv", "intermediate", "figure"), [(8, 1376, 10.58), (2, 1792, 11.47)])
def test_bytes_of_a_llama_layer(kv: int, intermediate: int, figure: float) -> None:
    """7B's and 8B's ratios: every saved tensor once, and the statistics in fp32."""
    tokens, hidden, heads = 128, 512, 8

    def kept(layers: int) -> int:
        sizes = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv}
        model = llama(layers, torch.bfloat16, intermediate_size=intermediate, **sizes)
        for layer in model.model.layers:
            wrap_module(layer)
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        with measure_saved(model) as saved:
            loss = model(input_ids=ids, labels=ids).loss
        assert loss.requires_grad
        return saved.total

    a_norm = 3 * nbytes((tokens, hidden), "e4m3", torch.float32) + 4 * tokens  # x, normed x, output; 1/rms
    attention = 2 * nbytes((tokens, hidden), "e4m3", torch.bfloat16) + 4 * heads * tokens  # q, out; log-sum-exp
    attention += 2 * nbytes((tokens, hidden // heads * kv), "e4m3", torch.bfloat16)  # k, v
    mlp = 4 * nbytes((tokens * intermediate,), "e4m3", torch.bfloat16)  # gate, its silu, up, the product; flat
    assert (kept(3) - kept(1)) / 2 == 2 * a_norm + attention + mlp
    assert (2 * a_norm + attention + mlp) / (tokens * hidden * 2) == pytest.approx(figure, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_none_changes_nothing(dtype: torch.dtype, attention: str) -> None:
    model = llama(dtype=dtype, attn_implementation=attention)
    plain = step(model)
    for layer in model.model.layers:
        wrap_module(layer, fmt="none", min_numel=0)
    assert_same(step(model), plain)


def test_another_family_with_dropout() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=64, n_embd=64, n_layer=2, n_head=4, use_cache=False))
    results = []
    for fmt in (None, "none", "e4m3"):
        undo = [wrap_module(block, fmt=fmt) for block in model.transformer.h] if fmt else []
        torch.manual_seed(4)
        results.append(step(model.train()))
        for one in undo:
            one()
    assert_same(results[1], results[0])
    assert torch.equal(results[2][0], results[0][0])
    assert any(not torch.equal(g, results[0][1][name]) for name, g in results[2][1].items())


def test_error_of_an_mlp_is_within_the_derived_bound() -> None:
    """y = W2 silu(W1 x): saved are x, a = W1 x, h = silu(a), each off by at most dx, da, dh; the weights are exact.

    g2 = W2ᵀ g is exact. dW2 = g hᵀ is off by |g| dhᵀ. The gradient of a is g2 silu'(a'), and |silu''| <= 1/2, so it
    is off by e = |g2| da / 2. dW1 is then off by e |x'|ᵀ + |g2 silu'(a)| dxᵀ, and the gradient of x by |W1|ᵀ e.
    """
    torch.manual_seed(0)
    w1, w2 = torch.randn(256, 128, dtype=torch.float64) / 11, torch.randn(128, 256, dtype=torch.float64) / 16
    module = Calls(lambda m, x: nn.functional.silu(x @ m.w1.T) @ m.w2.T, w1=w1, w2=w2)
    x = torch.randn(64, 128, dtype=torch.float64, requires_grad=True)
    g = torch.randn(64, 128, dtype=torch.float64)
    inputs = (x, *module.parameters())
    exact = torch.autograd.grad(module(x), inputs, g)
    wrap_module(module)
    ours = torch.autograd.grad(module(x), inputs, g)

    def off(t: Tensor) -> Tensor:  # Grouped's bound; 2**-16: t / s is rounded to fp32 first
        scales = compress(t, "e4m3")[1].double().repeat_interleave(128, -1)
        return torch.maximum(t.abs() / 17, scales / 1024) * (1 + 2.0**-16)

    with torch.no_grad():
        a = x @ w1.T
        sigma, h, g2 = a.sigmoid(), nn.functional.silu(a), (g @ w2).abs()
        slope = (sigma * (1 + a * (1 - sigma))).abs()
        e = g2 * off(a) / 2
        bounds = (e @ w1.abs(), e.T @ (x.abs() + off(x)) + (g2 * slope).T @ off(x), g.abs().T @ off(h))
    for name, got, want, bound in zip(("x", "w1", "w2"), ours, exact, bounds, strict=True):
        error = (got - want).abs()
        assert (error <= bound).all(), name
        # The worst cases of all terms do not meet: a sum of n of them is typically sqrt(n) of its bound.
        assert error.norm() >= bound.norm() / 256, name


def stays(name: str) -> Tensor:
    """Tensors that must not be compressed, all large enough and in a graph unless this is the point."""
    x, weight = leaf(64, 64), nn.Parameter(torch.ones(64, 64))
    made: dict[str, Callable[[], Tensor]] = {
        "parameter": lambda: weight,
        "transposed parameter": lambda: weight.T,
        "part of a parameter": lambda: weight.view(4, 1024)[1:3],
        "cast of a parameter": lambda: weight.to(torch.bfloat16).T,
        "frozen cast": lambda: weight.detach().to(torch.bfloat16),
        "mask": lambda: torch.zeros(64, 64),
        "integers": lambda: torch.ones(64, 64, dtype=torch.int64),
        "booleans": lambda: torch.ones(64, 64, dtype=torch.bool),
        "8-bit floats": lambda: torch.ones(64, 64).to(torch.float8_e4m3fn),
        "complex": lambda: torch.ones(64, 64, dtype=torch.complex64, requires_grad=True),
        "statistic of rows": lambda: (x * x).sum(-1, keepdim=True).rsqrt(),
        "a single number": lambda: x.sum(),
        "statistic of heads": lambda: x.view(64, 4, 16).logsumexp(-1)[:, :2],
        "broadcast": lambda: (x[:1] * 2).expand(64, 64),
        "sparse": lambda: (x * 2).to_sparse(),
    }
    return made[name]()


@pytest.mark.parametrize(
    "name",
    [
        *("parameter", "transposed parameter", "part of a parameter", "cast of a parameter", "frozen cast", "mask"),
        *("integers", "booleans", "8-bit floats", "complex", "statistic of rows", "statistic of heads", "broadcast"),
        *("sparse", "a single number"),
    ],
)
def test_what_stays(name: str) -> None:
    tensor = stays(name)
    place = packer(like=64 * 64).pack(tensor)
    assert isinstance(place, AsIs)
    out = place.get()
    assert out.dtype is tensor.dtype
    assert out.is_sparse == tensor.is_sparse
    if tensor.dtype is torch.float8_e4m3fn:
        out, tensor = out.view(torch.uint8), tensor.view(torch.uint8)
    assert torch.equal(out.to_dense(), tensor.to_dense())


@pytest.mark.parametrize("name", ["output", "leaf input", "embedding of a parameter", "sum of parameters"])
def test_what_is_compressed(name: str) -> None:
    x, weight = leaf(64, 64), nn.Parameter(torch.randn(64, 64))
    tensor = {
        "output": x * 2,
        "leaf input": x,
        "embedding of a parameter": weight[torch.arange(64)],
        "sum of parameters": weight + x,
    }[name]
    place = packer(like=64 * 64).pack(tensor)
    assert isinstance(place, _Saved)
    assert torch.equal(place.get(), rounded(tensor.detach().flatten()).view(64, 64))


def test_small_tensors_stay() -> None:
    x = leaf(32, 32) * 2
    assert isinstance(packer(min_numel=1025).pack(x), AsIs)
    assert isinstance(packer(min_numel=1024).pack(x), _Saved)
    assert isinstance(packer(like=16 * 1024 + 1).pack(x), AsIs)
    assert isinstance(packer(like=16 * 1024).pack(x), _Saved)


def test_without_a_float_input_the_first_large_tensor_is_the_measure() -> None:
    pack = packer(min_numel=100)
    assert isinstance(pack.pack(leaf(3, 5)), AsIs)
    assert isinstance(pack.pack(leaf(64, 64)), _Saved)
    assert isinstance(pack.pack(leaf(64, 3)), AsIs)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "flattened": lambda x: x.view(-1, 48),
    "heads": lambda x: x.view(4, 32, 3, 16).transpose(1, 2),
    "transposed": lambda x: x.view(128, 48).T,
    "half of the channels": lambda x: x[..., :24],
    "every second token": lambda x: x[:, ::2],
    "last batches": lambda x: x[2:],
    "ragged": lambda x: x.view(-1)[: 4 * 32 * 48 - 48].view(-1, 48),
    "flipped": lambda x: x.flip(0),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("fmt", ["none", "e4m3", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_every_layout_comes_back(name: str, fmt: str, dtype: torch.dtype) -> None:
    tensor = LAYOUTS[name](leaf(4, 32, 48, dtype=dtype) * 1)
    place = packer(fmt=fmt).pack(tensor)
    assert isinstance(place, _Saved)
    out = place.get()
    assert out.shape == tensor.shape
    assert out.dtype is dtype
    assert not out.requires_grad
    if place.layout is not None:
        assert out.stride() == tensor.stride()
    # Grouped's bounds with the tensor's largest value in place of each group's, and bf16's own rounding.
    largest = tensor.detach().double().abs().max()
    step = {"none": 0.0, "e4m3": 1 / 17 + 2.0**-8, "int8": (1 + 2.0**-7) / 254 + 2.0**-8}[fmt]
    error = (out.double() - tensor.detach().double()).abs()
    allowed = step * (tensor.detach().double().abs() + largest * 2.0**-8 if fmt == "e4m3" else largest)
    assert (error <= allowed).all()
    assert fmt == "none" or error.any()


def codes_of(place: _Saved | AsIs) -> _Codes:
    assert isinstance(place, _Saved)
    return place.codes


def test_one_tensor_is_compressed_once_under_all_its_shapes() -> None:
    pack, x = packer(), leaf(4, 32, 48) * 1
    places = [pack.pack(view) for view in (x, x, x.view(-1, 48), x.view(4, 32, 3, 16).transpose(1, 2))]
    assert len({id(codes_of(p)) for p in places}) == 1
    others = [pack.pack(view) for view in (x[2:], x[..., :24], x * 1, x[..., :24])]
    assert len({id(codes_of(p)) for p in [places[0], *others]}) == 4


def test_a_change_in_place_makes_another_tensor() -> None:
    pack, x = packer(), leaf(64, 64) * 1
    before = pack.pack(x)
    value = x.detach().clone()
    with torch.no_grad():
        x.mul_(-3)
    after = pack.pack(x)
    assert torch.equal(before.get(), rounded(value.flatten()).view(64, 64))
    assert torch.equal(after.get(), rounded(x.detach().flatten()).view(64, 64))


def test_the_table_keeps_neither_tensors_nor_codes() -> None:
    pack, x = packer(), leaf(64, 64) * 1
    storage = StorageWeakRef(x.untyped_storage())
    place = pack.pack(x)
    codes = StorageWeakRef(codes_of(place).parts[0].untyped_storage())
    del x
    assert storage.expired()
    assert not codes.expired()
    del place
    assert codes.expired()


def test_an_address_given_away_is_not_taken_for_the_tensor_that_had_it() -> None:
    pack, places, addresses = packer(), [], set()
    for i in range(50):
        x = torch.full((64, 64), float(i + 1), requires_grad=True)
        places.append(pack.pack(x))
        addresses.add(x.data_ptr())
        del x
    assert len(addresses) < 50  # the allocator did give some away
    for i, place in enumerate(places):
        assert torch.equal(place.get(), rounded(torch.full((64, 64), float(i + 1))))


def test_memory_that_is_kept_anyway_is_not_compressed_beside_it() -> None:
    pack, x = packer(), leaf(64, 64) * 1
    kept = pack.pack(x.detach())  # a custom Function's own intermediate has no gradient
    assert isinstance(kept, AsIs)
    assert isinstance(pack.pack(x), AsIs)
    del kept
    assert isinstance(pack.pack(x), _Saved)


def test_saved_tensors_die_with_the_graph() -> None:
    module = Calls(lambda m, x: (x * m.w).sigmoid() * x, w=torch.ones(64, 64))
    wrap_module(module, min_numel=0)
    gc.disable()
    try:
        inner = module(leaf(64, 64) * 1)
        storage = StorageWeakRef(inner.untyped_storage())
        out = (inner * 2).sum()
        del inner
        assert storage.expired()
        out.backward()
        with measure_saved(module) as saved:
            out = module(leaf(64, 64) * 1).sum()
            assert saved.total > 0
            del out
            assert saved.total == 0
    finally:
        gc.enable()


def test_a_change_in_place_of_what_stays_is_autograds_error() -> None:
    module = Calls(lambda m, x, mask: x * mask * m.w, w=torch.ones(8, 8))
    wrap_module(module)
    mask = torch.ones(8, 8)
    out = module(leaf(8, 8), mask)
    mask.zero_()
    with pytest.raises(
        RuntimeError, match=r"modified by an inplace operation: \[.*\[8, 8\]\] is at version 1; expected"
    ):
        out.sum().backward()


def test_under_autocast_no_weight_is_rounded() -> None:
    """The gradient of a linear layer's input depends on its weight alone, trained or frozen."""
    for frozen in (False, True):
        layer = nn.Linear(128, 96, bias=False)
        layer.weight.requires_grad_(not frozen)
        grads = []
        for wrap in (False, True):
            if wrap:
                wrap_module(layer, min_numel=0)
            x = leaf(4, 16, 128)
            with torch.autocast("cpu", torch.bfloat16):
                out = layer(x * 1)
            out.float().square().sum().backward()
            grads.append(x.grad)
        assert torch.equal(grads[0], grads[1])


def test_inside_a_checkpoint_the_checkpoint_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)), leaf(128, 64)
    inputs = (x, *module.parameters())
    want = torch.autograd.grad(module(x).square().sum(), inputs)
    wrap_module(module, min_numel=0)

    def refuse(self: _Packer, tensor: Tensor) -> None:
        raise AssertionError("asked about a tensor")

    monkeypatch.setattr(_Packer, "pack", refuse)
    got = torch.autograd.grad(checkpoint(module, x, use_reentrant=False).square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with pytest.raises(AssertionError, match="asked about a tensor"):
        module(x)


def test_seeds_differ_between_the_tensors_of_one_pass() -> None:
    x = torch.randn(64, 64)
    pack = _Packer("e4m3", 0, None, 5)
    first, second = (codes_of(pack.pack(x.clone().requires_grad_())).parts[0] for _ in range(2))
    assert not torch.equal(first, second)
    again = _Packer("e4m3", 0, None, 5)
    assert torch.equal(first, codes_of(again.pack(x.clone().requires_grad_())).parts[0])


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [(-1, ValueError, "min_numel=-1: must be at least 0"), (1e3, TypeError, "min_numel=1000.0: expected an integer")],
)
def test_a_bad_min_numel_is_named(value: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        wrap_module(nn.Linear(2, 2), min_numel=value)
