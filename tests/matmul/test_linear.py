"""Products on a model: which linears, what they keep under each tier, and who else is on the model."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_lowmem.activations import convert, undo
from hf_lowmem.activations.linears import linears_of_layers
from hf_lowmem.kernels.operands import CODE_ROWS
from hf_lowmem.matmul import OwnedProducts, linear, products_of
from hf_lowmem.matmul.products import RECIPES
from hf_lowmem.matmul.spec import MatmulSpec
from hf_lowmem.memory import measure_saved
from hf_lowmem.optim import StepInBackward, make_optimizer
from hf_lowmem.patching import forwards_of
from hf_lowmem.specs import STREAMED, TIERS
from hf_lowmem.weights import resting
from tests.conftest import tiny_llama

ROW = MatmulSpec(recipe="fp8_row", least=0)
IDS = torch.randint(128, (2, 24), generator=torch.Generator().manual_seed(0))


def model(**overrides: Any) -> Any:
    return tiny_llama(dtype=torch.bfloat16, **overrides).train()


def step(of: Any) -> tuple[float, int, dict[str, torch.Tensor]]:
    """Loss, bytes kept for backward, gradients."""
    of.zero_grad()
    with measure_saved(of) as saved:
        loss = of(input_ids=IDS, labels=IDS).loss
        kept = saved.total
    loss.backward()
    return loss.item(), kept, {n: p.grad for n, p in of.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("tier", [*TIERS, *STREAMED])
def test_a_tier_keeps_not_a_byte_more(tier: str, recipe: str) -> None:
    """And the loss is the same as without a tier: forward is the same products."""
    llama = model()
    with_products = OwnedProducts(linears_of_layers(llama), MatmulSpec(recipe=recipe, least=0))
    loss, _, exact = step(llama)
    with_products.take_off()
    convert(llama, tier)
    _, alone, _ = step(llama)
    OwnedProducts(linears_of_layers(llama), MatmulSpec(recipe=recipe, least=0))
    again, kept, gradients = step(llama)
    assert (again, kept) == (loss, alone)
    for name, want in exact.items():
        assert (gradients[name].float() - want.float()).norm() < 0.15 * want.float().norm() + 1e-6, name
    if tier in ("exact", "stream"):  # which give back what they were asked to keep
        assert torch.equal(
            gradients["model.layers.0.mlp.down_proj.weight"], exact["model.layers.0.mlp.down_proj.weight"]
        )


def test_without_a_tier_codes_are_kept_in_the_place_of_inputs() -> None:
    llama = model()
    _, plain, _ = step(llama)
    OwnedProducts(linears_of_layers(llama), ROW)
    _, kept, _ = step(llama)
    tokens, hidden, ffn, scales = 48, 64, 96, 4 * 4
    # Of three inputs and of act * up a byte a value in the place of two; o_proj's is kept by attention as well.
    assert plain - kept == tokens * (hidden + hidden + ffn - hidden - scales)


def test_linears_that_read_one_input_share_its_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    llama, called = model(), []
    OwnedProducts(linears_of_layers(llama), ROW)

    def counted(x: torch.Tensor, *args: Any) -> Any:
        called.append(tuple(x.shape))
        return CODE_ROWS(x, *args)

    monkeypatch.setattr("hf_lowmem.matmul.products.CODE_ROWS", counted)
    llama(input_ids=IDS)
    assert [shape for shape in called if shape[0] == 48] == [(48, 64), (48, 64), (48, 64), (48, 96)]


def test_only_linears_of_attention_and_mlp_are_handled() -> None:
    llama = model(num_hidden_layers=2)
    handled = products_of(linears_of_layers(llama), ROW).handled
    assert len(handled) == 14
    assert not any(word in name for name in handled for word in ("head", "embed", "norm"))
    adapted = get_peft_model(llama, LoraConfig(r=16, target_modules=["q_proj", "down_proj"]))
    found = linears_of_layers(adapted)
    assert sum(name.endswith("base_layer") for name in found) == 4
    assert not any("lora" in name.rpartition("base_model")[2] for name in found)
    OwnedProducts(found, ROW)
    _, _, gradients = step(adapted)
    assert gradients
    assert all("lora_" in name for name in gradients)


def why(module: nn.Module, least: int = 0, recipe: str = "fp8_row") -> str | None:
    return linear.why_not(module, recipe, least)


def test_what_is_left_is_said() -> None:
    assert why(nn.Linear(64, 32)) is None
    assert "multiples of 16" in str(why(nn.Linear(64, 40)))
    assert "below 17" in str(why(nn.Linear(64, 16), recipe="int8_row"))
    assert "is below 2048" in str(why(nn.Linear(64, 64), 2048))
    assert why(nn.Linear(4096, 1024), 2048) is None
    assert "torch.int8" in str(why(with_weight(nn.Linear(64, 64), torch.int8)))
    other = type("Linear4bit", (nn.Linear,), {})(64, 64)
    assert "Linear4bit is no plain linear" in str(why(other))
    moved = nn.Linear(64, 64)
    moved.forward = lambda input: input
    assert "replaced its forward" in str(why(moved))


def with_weight(module: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    module.weight = nn.Parameter(module.weight.to(dtype), requires_grad=False)
    return module


def test_a_model_of_which_nothing_is_multiplied_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lowmem_matmul='fp8_row' has.*is below 2048.*_least=0"):
        products_of(linears_of_layers(model()), MatmulSpec(recipe="fp8_row"))
    with pytest.raises(ValueError, match=r"no linear inside of attention.*Leave lowmem_matmul unset"):
        products_of({}, ROW)


def test_the_plain_product_runs_in_eval_mode_and_for_few_tokens() -> None:
    llama = model()
    plain = llama.eval()(input_ids=IDS).logits
    products = OwnedProducts(linears_of_layers(llama), MatmulSpec(recipe="fp8_row", least=49))
    assert torch.equal(llama(input_ids=IDS).logits, plain)
    linear._say_few.cache_clear()
    with pytest.warns(UserWarning, match="fewer than 49 tokens.*lowmem_matmul_least"):
        assert torch.equal(llama.train()(input_ids=IDS).logits, plain)
    products.take_off()
    assert not any(list(forwards_of(m)) for m in llama.modules())


def test_a_copy_has_products_of_its_own() -> None:
    llama = model()
    OwnedProducts(linears_of_layers(llama), ROW)
    twin = copy.deepcopy(llama)
    nn.init.zeros_(llama.model.layers[0].mlp.down_proj.weight)
    assert step(twin)[0] != step(llama)[0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_makes_the_same_products_again(reentrant: bool) -> None:
    llama = model(num_hidden_layers=2)
    OwnedProducts(linears_of_layers(llama), ROW)
    loss, _, want = step(llama)
    llama.gradient_checkpointing_enable({"use_reentrant": reentrant})
    llama.enable_input_require_grads()
    again, _, got = step(llama)
    assert loss == again
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.train
@pytest.mark.train
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_compiled_linear_is_one_graph_with_the_same_bits(recipe: str) -> None:
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(64, 32, dtype=torch.bfloat16)
        OwnedProducts({"layer": layer}, MatmulSpec(recipe=recipe, least=0))
        run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
        x = torch.randn(48, 64, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
        y = run(x)
        y.float().square().sum().backward()
        found.append([y.detach(), x.grad, layer.weight.grad])
    for eager, traced in zip(*found, strict=True):
        assert torch.equal(eager, traced)


def test_two_backward_passes_of_one_graph_are_equal_and_a_changed_weight_is_an_error() -> None:
    layer = nn.Linear(64, 32)
    OwnedProducts({"layer": layer}, ROW)
    x = torch.randn(48, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = layer(x).sum()
    first, second = (torch.autograd.grad(y, (x, layer.weight), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    with torch.no_grad():
        layer.weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, x)
    undo(layer)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_weight_at_rest_is_decoded_and_multiplied_as_the_bf16_one_that_it_decodes_to(recipe: str) -> None:
    llama = model(num_hidden_layers=2)
    OwnedProducts(linears_of_layers(llama), MatmulSpec(recipe=recipe, least=0))
    optimizer = make_optimizer("adamw", llama, weights="int8_sr")
    kept = resting(llama)
    twin = model(num_hidden_layers=2)
    for name, p in twin.named_parameters():
        p.data.copy_(kept[name].decode() if name in kept else llama.get_parameter(name))
    OwnedProducts(linears_of_layers(twin), MatmulSpec(recipe=recipe, least=0))
    assert len(kept) == 15
    (loss, kept_bytes, got), (want_loss, want_bytes, want) = step(llama), step(twin)
    assert loss == want_loss
    assert kept_bytes <= want_bytes
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    llama.zero_grad()
    stepping = StepInBackward(optimizer)
    llama(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert not any(torch.equal(kept[name].decode(), p) for name, p in twin.named_parameters() if name in kept)
    x = torch.randn(48, 64, dtype=torch.bfloat16)
    first, loss = (llama.model.layers[0].mlp.up_proj(x).sum() for _ in range(2))
    first.backward()
    with pytest.raises(RuntimeError, match="was updated after the forward pass"):
        loss.backward()
    stepping.forget()
    # A training after it finds the weights at rest.
    OwnedProducts(linears_of_layers(llama), MatmulSpec(recipe=recipe, least=0))
    llama(input_ids=IDS, labels=IDS).loss.backward()
