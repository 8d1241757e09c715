"""Frozen models below adapters, of which codes alone are kept: the same bits, a byte a weight, and nothing lost."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from hf_lowmem.activations import convert
from hf_lowmem.activations.linears import linears_of_layers
from hf_lowmem.matmul import OwnedProducts, products_of
from hf_lowmem.matmul.products import RECIPES
from hf_lowmem.matmul.spec import MatmulSpec
from hf_lowmem.memory import measure_saved, parameter_bytes
from hf_lowmem.specs import STREAMED, TIERS
from hf_lowmem.weights import FrozenCodes, at_rest, resting, wake
from tests.conftest import tiny_llama

IDS = torch.randint(128, (2, 24), generator=torch.Generator().manual_seed(0))
BF16 = torch.bfloat16
VALUES = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96  # weights of one layer's linears
ROWS = 64 + 64 + 2 * 32 + 2 * 96 + 64  # their output channels


def spec(recipe: str = "fp8_row") -> MatmulSpec:
    return MatmulSpec(recipe=recipe, least=0)


def adapted(dtype: torch.dtype = BF16, **lora: Any) -> Any:
    torch.manual_seed(0)
    options: dict[str, Any] = {"r": 8, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False} | lora
    return get_peft_model(tiny_llama(dtype=dtype), LoraConfig(**options)).train()


def coded(recipe: str = "fp8_row", dtype: torch.dtype = BF16) -> tuple[Any, OwnedProducts]:
    model = adapted(dtype)
    return model, OwnedProducts(linears_of_layers(model), spec(recipe), model)


def step(model: Any) -> tuple[list[torch.Tensor], int]:
    """Loss and gradients; bytes kept for backward."""
    model.zero_grad()
    with measure_saved(model) as saved:
        loss = model(input_ids=IDS, labels=IDS).loss
        kept = saved.total
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], kept


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("recipe", RECIPES)
def test_bits_are_those_of_the_weights_and_bytes_are_counted(recipe: str, dtype: torch.dtype) -> None:
    model = adapted(dtype)
    before = parameter_bytes(model)
    OwnedProducts(linears_of_layers(model), spec(recipe))
    want, kept = step(model)
    assert parameter_bytes(model) == before
    products = OwnedProducts(linears_of_layers(model), spec(recipe), model)
    got, again = step(model)
    assert all(map(torch.equal, want, got))
    assert again <= kept
    scales = 4 * (7 if RECIPES[recipe].whole else ROWS)
    of_one = 7 * dtype.itemsize  # what is seen under the weights' shapes
    assert before - parameter_bytes(model) == VALUES * (dtype.itemsize - 1) - scales - of_one
    assert products.report.frozen_bytes == (VALUES * dtype.itemsize, VALUES + scales + of_one)
    assert "codes alone: 7 frozen weights" in str(products.report)


@pytest.mark.parametrize("tier", [*TIERS, *STREAMED])
def test_under_each_tier(tier: str) -> None:
    found = []
    for alone in (False, True):
        model = adapted()
        OwnedProducts(linears_of_layers(model), spec(), model if alone else None)
        convert(model, tier)
        found.append(step(model))
    assert all(map(torch.equal, found[0][0], found[1][0]))
    assert found[1][1] <= found[0][1]


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_a_checkpoint_and_autocast(reentrant: bool) -> None:
    found = []
    for alone in (False, True):
        model = adapted(torch.float32)
        OwnedProducts(linears_of_layers(model), spec("int8_row"), model if alone else None)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        with torch.autocast("cpu", BF16):
            found.append(step(model)[0])
    assert all(map(torch.equal, *found))


def test_evaluation_and_few_tokens_use_what_the_codes_decode_to() -> None:
    model, products = coded()
    twin = adapted()
    for name, p in twin.named_parameters():
        kept = at_rest(model.get_parameter(name))
        if kept is not None:
            assert 0 < (kept.decode() - p).norm() < 0.04 * p.norm()
            p.data.copy_(kept.decode())
    model.eval()
    twin.eval()
    want = twin(input_ids=IDS).logits
    assert torch.equal(model(input_ids=IDS).logits, want)
    with model.disable_adapter(), twin.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, twin(input_ids=IDS).logits)
    products.take_off()  # codes stay
    assert torch.equal(model(input_ids=IDS).logits, want)
    assert torch.equal(model.generate(IDS[:, :4], max_new_tokens=3), twin.generate(IDS[:, :4], max_new_tokens=3))
    few = OwnedProducts(linears_of_layers(model), MatmulSpec(recipe="fp8_row", least=49), model)
    got, want = step(model.train())[0], step(twin.train())[0]
    assert all(map(torch.equal, got, want))
    few.take_off()


def test_an_adapter_is_saved_without_decoding_and_a_state_dict_decodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = coded()
    called: list[str] = []
    decode = FrozenCodes.decode
    monkeypatch.setattr(FrozenCodes, "decode", lambda kept: (called.append(kept.name), decode(kept))[1])
    model.save_pretrained(tmp_path)
    assert not called
    loaded = PeftModel.from_pretrained(tiny_llama(dtype=BF16), tmp_path)
    for name, p in loaded.named_parameters():
        if "lora_" in name:
            assert torch.equal(p, model.get_parameter(name))
    state = model.state_dict()
    assert len(called) == 7
    kept = {name: at_rest(p) for name, p in model.named_parameters()}
    for name, value in kept.items():
        assert type(state[name]) is torch.Tensor
        assert value is None or torch.equal(state[name], decode(value))  # type: ignore[arg-type]
    before = [t.clone() for value in kept.values() if value is not None for t in value.stored()]
    model.load_state_dict(state)  # what was decoded has the codes that it was decoded from
    model.load_state_dict(adapted().state_dict())  # and so has the model as it was loaded
    after = [t for value in kept.values() if value is not None for t in value.stored()]
    assert all(map(torch.equal, before, after))
    assert not resting(model)  # which lists what an optimizer steps


MERGES = {
    "merge_adapter": lambda model: model.merge_adapter(),
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "a copy": lambda model: copy.deepcopy(model),
    "another dtype": lambda model: model.base_model.model.model.layers[0].half(),
    "a weight's norm": lambda model: model.base_model.model.model.layers[0].mlp.up_proj.weight.norm(),
}


@pytest.mark.parametrize("name", MERGES)
def test_who_reads_a_weight_is_told_how(name: str) -> None:
    model, _ = coded()
    with pytest.raises(RuntimeError, match=r"weight is kept as 8-bit codes alone \(lowmem_matmul='fp8_row'.*wake\(m"):
        MERGES[name](model)


def test_woken_it_can_be_merged_and_unload_needs_no_waking() -> None:
    model, products = coded()
    products.take_off()
    want = model.eval()(input_ids=IDS).logits
    base = model.unload()
    assert base(input_ids=IDS).logits.isfinite().all()
    model, products = coded()
    wake(model)  # while products are on: they code at each use again, and see what is merged
    inner = model.eval().merge_and_unload()
    got = inner(input_ids=IDS).logits
    assert (got - want).float().norm() < 0.02 * want.float().norm()
    assert all(type(p) is nn.Parameter for p in inner.parameters())
    inner.train()
    loss = inner(input_ids=IDS, labels=IDS).loss
    inner.model.layers[0].mlp.down_proj.weight.data.zero_()
    assert inner(input_ids=IDS, labels=IDS).loss != loss


def frozen_of(model: Any, **options: Any) -> list[str | None]:
    return list(products_of(linears_of_layers(model), spec(), model, **options).frozen.values())


def test_weights_that_must_be_there_are_kept_and_it_is_said_why() -> None:
    assert frozen_of(adapted()) == [None] * 7
    assert frozen_of(tiny_llama()) == []
    partly = tiny_llama()
    partly.model.layers[0].mlp.requires_grad_(False)
    assert frozen_of(partly) == ["frozen, and part of the model that is saved"] * 3
    reads = frozen_of(adapted(use_dora=True, init_lora_weights=True))
    assert reads.count("frozen, and read by its adapter (lora, as with use_dora)") == 2
    assert reads.count(None) == 5
    assert frozen_of(adapted(), whole="frozen, and FSDP2 reads it") == ["frozen, and FSDP2 reads it"] * 7
    tied = adapted(target_modules=["q_proj"])
    layer = tied.base_model.model.model.layers[0]
    layer.mlp.gate_proj.weight = layer.mlp.up_proj.weight
    assert frozen_of(tied).count("frozen, and tied to another") == 2


def test_a_weight_of_nan_and_codes_of_another_recipe_are_refused() -> None:
    model, products = coded()
    products.take_off()
    with pytest.raises(
        ValueError, match=r"'int8_row': .*codes alone \(lowmem_matmul='fp8_row'.*Set.*='fp8_row', or lo"
    ):
        OwnedProducts(linears_of_layers(model), spec("int8_row"), model)
    model = adapted()
    with torch.no_grad():
        model.base_model.model.model.layers[0].mlp.up_proj.weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"weight: a NaN or an Inf in a frozen weight"):
        OwnedProducts(linears_of_layers(model), spec(), model)
    with pytest.raises(RuntimeError, match="no optimizer can update"):
        at_rest(coded()[0].base_model.model.model.layers[0].mlp.up_proj.weight).load()  # type: ignore[union-attr]


def test_codes_that_are_replaced_before_backward_are_an_error() -> None:
    model, _ = coded()
    loss = model(input_ids=IDS, labels=IDS).loss
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.train
@pytest.mark.parametrize("recipe", RECIPES)
def test_compiled_it_is_one_graph_with_the_same_bits(recipe: str) -> None:
    torch.compiler.reset()
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model: Any = get_peft_model(nn.Sequential(nn.Linear(64, 32, dtype=BF16)), LoraConfig(r=4, target_modules=["0"]))
        layer = model.base_model.model[0].base_layer
        OwnedProducts({"base_model.model.0.base_layer": layer}, spec(recipe), model)
        assert at_rest(layer.weight) is not None
        run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
        x = torch.randn(48, 64, generator=torch.Generator().manual_seed(1)).to(BF16).requires_grad_()
        y = run(x)
        y.float().square().sum().backward()
        found.append([y.detach(), x.grad])
    torch.compiler.reset()
    assert all(map(torch.equal, *found))
