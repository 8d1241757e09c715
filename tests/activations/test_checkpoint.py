"""checkpoint_fp8: bytes, gradients against torch's checkpoint and at the rounded input, and what it composes with."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from transformers import MixtralConfig, MixtralForCausalLM

from hf_lowmem.activations.checkpoint import wrap_layer
from hf_lowmem.activations.formats import compress, decompress, nbytes
from hf_lowmem.memory import measure_saved
from tests.activations.wrapped_models import Block, assert_same, llama, loss_of, step


def wrapped(model: Any, **options: Any) -> Any:
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        wrap_layer(layer, **options)
    return model


@pytest.mark.parametrize(("fmt", "units"), [("e4m3", 0.55), ("int8", 0.55), ("none", 1.0)])
def test_a_layer_keeps_its_compressed_input_and_nothing_else(fmt: str, units: float) -> None:
    def kept(layers: int) -> int:
        model = llama(layers, torch.bfloat16, hidden_size=512, intermediate_size=1376, num_attention_heads=8)
        model = wrapped(model, fmt=fmt)
        ids = torch.zeros(1, 64, dtype=torch.int64)
        with measure_saved(model) as saved:
            loss = model(input_ids=ids, labels=ids).loss
        assert loss.requires_grad
        return saved.total

    a_layer = (kept(3) - kept(1)) / 2
    assert a_layer == nbytes((1, 64, 512), fmt, torch.bfloat16)
    assert a_layer <= units * 64 * 512 * 2


def test_the_input_itself_is_freed() -> None:
    model, inputs = wrapped(llama(3)), []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, args: inputs.append(StorageWeakRef(args[0].untyped_storage())))
    loss = loss_of(model)
    assert len(inputs) == 3
    assert all(ref.expired() for ref in inputs[1:])  # the first is the embedding's output, an input of the model
    loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_none_is_torchs_checkpoint(dtype: torch.dtype) -> None:
    plain = llama(dtype=dtype)
    with_hf = copy.deepcopy(plain)
    with_hf.gradient_checkpointing_enable({"use_reentrant": False})
    ours = step(wrapped(plain, fmt="none"))
    assert_same(ours, step(plain))
    assert_same(ours, step(with_hf))


@pytest.mark.parametrize("fmt", ["e4m3", "int8"])
def test_gradients_are_those_at_the_rounded_input(fmt: str) -> None:
    """Bit for bit, layer by layer: backward at x' of each layer, for the gradient that the layer above hands down."""
    model = llama(3)
    loss, grads = step(wrapped(model, fmt=fmt))
    seen: list[tuple[tuple, dict]] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    above: list[Tensor] = []
    model.model.norm.register_full_backward_hook(lambda m, g_in, g_out: above.append(g_in[0]))
    want = loss_of(model)
    assert torch.equal(want, loss)
    want.backward()
    (grad,) = above
    calls = list(zip(range(3), list(model.model.layers), list(seen), strict=True))
    for i, layer, (args, kwargs) in reversed(calls):
        x = args[0].detach()
        rounded = decompress(compress(x, fmt), fmt, x.shape, x.dtype).requires_grad_()
        assert not torch.equal(rounded, x)
        names, params = zip(*layer.named_parameters(), strict=True)
        grad, *of_params = torch.autograd.grad(layer(rounded, **kwargs), (rounded, *params), grad)
        for name, g in zip(names, of_params, strict=True):
            assert torch.equal(grads[f"model.layers.{i}.{name}"], g)
    assert torch.equal(grads["lm_head.weight"], model.lm_head.weight.grad)


def test_error_of_a_linear_layer_is_within_the_formats_bound() -> None:
    """dW = gᵀx: |dW' - dW| <= |g|ᵀ |x' - x|, and |x' - x| <= max(|x| / 17, s / 1024), from Grouped. dx is exact."""
    layer = nn.Linear(256, 48).double()
    x = torch.randn(4, 32, 256, dtype=torch.float64, requires_grad=True)
    g = torch.randn(4, 32, 48, dtype=torch.float64)
    exact = torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), g)
    wrap_layer(layer)
    ours = torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), g)
    assert torch.equal(ours[0], exact[0])
    assert torch.equal(ours[2], exact[2])
    scales = compress(x, "e4m3")[1].double().repeat_interleave(128, -1)
    # 2**-16: x / s is rounded to fp32 before it is rounded to a code.
    allowed = torch.maximum(x.detach().abs() / 17, scales / 1024) * (1 + 2.0**-16)
    bound = g.flatten(0, 1).abs().T @ allowed.flatten(0, 1)
    error = (ours[1] - exact[1]).abs()
    assert (error > 0).all()
    assert (error <= bound).all()


def test_error_of_a_llama_layer_is_the_mean_value_theorems() -> None:
    """With G(x) a parameter's gradient, d = x' - x and H = dG/dx: G(x') - G(x) is the integral of H(x + t d) d over t
    in [0, 1], so its norm is at most the integral of |H(x + t d) d|, for each parameter. In float64; 4 Gauss-Legendre
    nodes against 8 show that the quadrature is exact to 1e-6.
    """
    model = llama(1, attn_implementation="eager")
    layer = model.model.layers[0]
    torch.manual_seed(1)
    x, g = torch.randn(2, 1, 12, 128, dtype=torch.float64)
    where = {"position_embeddings": model.model.rotary_emb(x, torch.arange(12)[None]), "attention_mask": None}
    params = dict(layer.named_parameters())

    def gradient(at: Tensor) -> dict[str, Tensor]:
        return torch.func.vjp(lambda p: torch.func.functional_call(layer, p, (at,), where), params)[1](g)[0]

    delta = decompress(compress(x, "e4m3"), "e4m3", x.shape, x.dtype) - x

    def bound(nodes: int) -> dict[str, float]:
        total = dict.fromkeys(params, 0.0)
        for t, w in np.stack(np.polynomial.legendre.leggauss(nodes)).T.tolist():
            slope = torch.func.jvp(gradient, (x + (t + 1) / 2 * delta,), (delta,))[1]
            for name in total:
                total[name] += w / 2 * slope[name].norm().item()
        return total

    exact = gradient(x)
    bounds = bound(4)
    assert bounds == pytest.approx(bound(8), rel=1e-6)
    wrap_layer(layer)
    layer(x, **where).backward(g)
    relative = {}
    for name, p in params.items():
        assert p.grad is not None
        error = (p.grad - exact[name]).norm().item()
        assert error <= bounds[name] * (1 + 1e-6), name
        assert error >= bounds[name] / 2  # the bound is close: rounding is the whole error
        relative[name] = error / exact[name].norm().item()
    worst = max(relative, key=lambda name: relative[name])
    print(f"worst parameter: {worst}, relative error {relative[worst]:.4f}")


def test_randomness_is_repeated_and_not_consumed() -> None:
    results = []
    for wrap in (False, True):
        block, x = Block(), torch.randn(4, 16, generator=torch.Generator().manual_seed(3))
        if wrap:
            wrap_layer(block, "none")
        torch.manual_seed(5)
        out, mean = block(x, scale=2.0)
        (out.square().sum() + mean).backward()
        results.append([out, mean, torch.rand(2), *(p.grad for p in block.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("wants", ["input", "extra", "both", "neither"])
def test_every_input_that_wants_a_gradient_gets_it(wants: str, by_name: bool) -> None:
    results = []
    for wrap in (False, True):
        block = Block()
        x = torch.linspace(-1, 1, 64).view(4, 16).requires_grad_(wants in ("input", "both"))
        extra = torch.linspace(1, 2, 40).requires_grad_(wants in ("extra", "both"))
        if wrap:
            wrap_layer(block, "none")
        torch.manual_seed(5)
        out, mean = block(hidden_states=x, extra=(extra,)) if by_name else block(x, (extra,))
        (out.square().sum() + mean).backward()
        results.append([x.grad, extra.grad, *(p.grad for p in block.parameters())])
    assert (results[1][0] is None, results[1][1] is None) == (
        wants not in ("input", "both"),
        wants not in ("extra", "both"),
    )
    for a, b in zip(*results, strict=True):
        assert a is b is None or torch.equal(a, b)


def _freeze(model: Any, keep: tuple[str, ...]) -> Any:
    for name, p in model.named_parameters():
        p.requires_grad_(any(part in name for part in keep))
    return model


def _lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.2, init_lora_weights=False)
    return get_peft_model(model, config).base_model.model


TRAINED = {
    "embeddings frozen": lambda m: _freeze(m, ("layers", "norm", "lm_head")),
    "one layer": lambda m: _freeze(m, ("layers.1",)),
    "norms": lambda m: _freeze(m, ("norm",)),
    "one matrix": lambda m: _freeze(m, ("layers.0.mlp.up_proj",)),
    "LoRA": _lora,
}


@pytest.mark.parametrize("name", TRAINED)
def test_frozen_models_get_the_gradients_of_what_is_trained(name: str) -> None:
    model = TRAINED[name](llama(3))
    torch.manual_seed(2)
    plain = step(model)
    torch.manual_seed(2)
    assert_same(step(wrapped(model, fmt="none")), plain)
    torch.manual_seed(2)
    loss, grads = step(wrapped(model))
    assert torch.equal(loss, plain[0])
    assert grads.keys() == plain[1].keys()


def test_a_layer_without_anything_to_train_keeps_nothing() -> None:
    model = wrapped(_freeze(llama(3), ("layers.2",)))
    with measure_saved(model) as saved:
        loss = loss_of(model)
    assert {name.split(".")[2] for name in saved.by_module_now if "layers" in name} == {"2"}
    assert sum(n for name, n in saved.by_module_now.items() if "layers" in name) == nbytes(
        (2, 24, 128), "e4m3", torch.float64
    )
    loss.backward()


def test_gradient_reaches_inputs_embeds() -> None:
    model = llama()
    embeds = model.get_input_embeddings()(torch.arange(24)[None]).detach()
    grads = []
    for m in (model, wrapped(model, fmt="none")):
        x = embeds.clone().requires_grad_()
        m(inputs_embeds=x, labels=torch.arange(24)[None]).loss.backward()
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1])


def test_autocast_is_the_forward_passs_own() -> None:
    model = llama(dtype=torch.float32)
    results = []
    for m in (model, wrapped(model, fmt="none")):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(m)
        loss.backward()  # outside of autocast
        results.append((loss.detach(), {name: p.grad.clone() for name, p in m.named_parameters()}))
    assert_same(*results)


def test_backward_may_run_twice() -> None:
    model = wrapped(llama())
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(model.parameters(), once, strict=True))


def test_step_in_backward() -> None:
    """A parameter changed as soon as its gradient is there is not needed any more, neither by its layer."""

    def train(model: nn.Module) -> list[Tensor]:
        def update(p: Tensor) -> None:
            assert p.grad is not None
            with torch.no_grad():
                p.sub_(p.grad, alpha=0.1)
            p.grad = None

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(update)
        losses = []
        for _ in range(3):
            loss = loss_of(model)
            loss.backward()
            losses.append(loss.detach())
        assert losses[2] < losses[0]
        return [*losses, *(p.detach() for p in model.parameters())]

    model = llama()
    ours = wrapped(model, fmt="none")
    assert all(torch.equal(a, b) for a, b in zip(train(model), train(ours), strict=True))


def test_ddp_finds_every_gradient() -> None:
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.nn.parallel import DistributedDataParallel

    model = llama()
    plain = step(model)
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(wrapped(model, fmt="none"))
        for _ in range(2):  # the second forward pass raises if the first one's gradients were not all reduced
            loss, grads = step(parallel)
    finally:
        destroy_process_group()
    assert_same((loss, {name.removeprefix("module."): g for name, g in grads.items()}), plain)


def test_an_outer_checkpoint_may_surround_it() -> None:
    blocks = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)).double()
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    want = torch.autograd.grad(blocks(x).square().sum(), (x, *blocks.parameters()))
    for module in (blocks[0], blocks[2]):
        wrap_layer(module, "none")
    out = checkpoint(blocks, x, use_reentrant=False)
    got = torch.autograd.grad(out.square().sum(), (x, *blocks.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_outer_hooks_get_the_codes() -> None:
    """So offloading around the model moves 0.51 U a layer."""
    model, seen = wrapped(llama(dtype=torch.bfloat16)), []

    def pack(t: Tensor) -> Tensor:
        seen.append((t.dtype, t.numel()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = loss_of(model)
    assert [n for dtype, n in seen if dtype is torch.uint8] == [2 * 24 * 128] * 2
    loss.backward()


def test_an_empty_cache_is_taken_away_with_a_warning() -> None:
    """transformers makes one by default (use_cache=True), in training as well."""
    model = llama(use_cache=True)
    plain = step(model)
    with pytest.warns(UserWarning, match="no key-value cache is filled in training"):
        ours = step(wrapped(model, fmt="none"))
    assert_same(ours, plain)


def test_a_cache_with_tokens_in_it_is_refused() -> None:
    model = llama(use_cache=True)
    with torch.no_grad():
        past = model.eval()(input_ids=torch.arange(5)[None]).past_key_values
    model = wrapped(model.train())
    with pytest.raises(ValueError, match=r"a key-value cache that holds tokens.*Train without it"):
        model(input_ids=torch.arange(4)[None], past_key_values=past)


def test_routed_experts_are_refused_but_for_the_exact_input() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_hidden_layers=2, vocab_size=128, use_cache=False)).train()
    with pytest.raises(
        ValueError, match=r"fmt='e4m3': MixtralDecoderLayer has routed experts \('mlp.experts'\).*fmt='none'"
    ):
        wrap_layer(model.model.layers[0])
    plain = step(model)
    assert_same(step(wrapped(model, fmt="none")), plain)


def test_a_module_without_hidden_states_is_named() -> None:
    layer = nn.Linear(2, 2)
    wrap_layer(layer)
    with pytest.raises(TypeError, match="called without a tensor `hidden_states`"):
        layer(input=torch.zeros(2))
    with pytest.raises(TypeError, match="int64 cannot be stored as e4m3"):
        layer(torch.zeros(2, dtype=torch.int64))
