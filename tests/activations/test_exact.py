"""Tier `exact`, and what holds in every tier: the loss is HuggingFace's bit for bit, and in `exact` the gradients are.

The issue allows 2 units in the last place; the design (autograd's own graph, fed with the same values) gives none, so
equality is what is asserted.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_lowmem.activations import convert, measure
from tests.activations.models import EXPERTS, FAMILIES, batch, build, loss_and_gradients, twin


def assert_equal_to_plain(plain: nn.Module, converted: nn.Module, inputs: dict[str, Any]) -> None:
    loss, gradients = loss_and_gradients(plain, inputs)
    ours, our_gradients = loss_and_gradients(converted, inputs)
    assert torch.equal(ours, loss)
    assert our_gradients.keys() == gradients.keys()
    unequal = [name for name, g in gradients.items() if not torch.equal(g, our_gradients[name])]
    assert not unequal
    assert any(g.abs().max() > 0 for g in gradients.values())


@pytest.mark.parametrize("family", [*FAMILIES, *EXPERTS])
def test_every_family_has_equal_loss_and_gradients_and_keeps_less(family: str) -> None:
    model = build(family)
    converted = twin(model, lambda m: convert(m, "exact"))
    inputs = batch()
    assert_equal_to_plain(model, converted, inputs)
    measured = measure(converted, lambda: converted(**inputs), inputs["input_ids"].numel())
    # Measured: 0.39 (apertus) to 0.68 (MLPs without a gate); 0.73 where experts are left alone.
    most = 0.75 if family in EXPERTS else 0.7
    assert all(after < most * before for before, after in measured.layers.values())


@pytest.mark.parametrize("family", ["llama", "gemma3", "olmo2", "phi3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_every_dtype(family: str, dtype: torch.dtype) -> None:
    model = build(family, dtype)
    assert_equal_to_plain(model, twin(model, lambda m: convert(m, "exact")), batch())


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_padding_packing_and_windows(family: str, attn: str) -> None:
    model = build(family, attn=attn)
    converted = twin(model, lambda m: convert(m, "exact"))
    inputs = batch(tokens=20)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :7] = 0
    assert_equal_to_plain(model, converted, inputs | {"attention_mask": mask})
    positions = torch.cat([torch.arange(8), torch.arange(12)]).expand(2, -1).contiguous()
    assert_equal_to_plain(model, converted, inputs | {"position_ids": positions})


def test_repeated_keys_and_values_are_kept_once() -> None:
    """With a mask HuggingFace copies keys and values for every query head, here one of each for four."""
    model = build("llama", num_key_value_heads=1)
    inputs = batch(tokens=24)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :7] = 0
    kept = []
    for extra in ({}, {"attention_mask": mask}):
        convert(model, "exact")
        found = measure(model, lambda extra=extra: model(**inputs, **extra), 48)
        kept.append(next(iter(found.layers.values()))[1] / 48)
    assert kept[0] == pytest.approx(kept[1], rel=0.05)  # the mask itself is all that may come on top


@pytest.mark.parametrize("tier", ["exact", "fp8", "fp8_recompute"])
def test_autocast(tier: str) -> None:
    model = build("llama")
    converted = twin(model, lambda m: convert(m, tier))
    with torch.autocast("cpu", torch.bfloat16):
        assert_matches(model, converted, exact=tier == "exact")


def test_autocast_keeps_no_copy_of_a_weight() -> None:
    """HuggingFace keeps the bf16 copy of every weight in the graph: of 4 x 64² + 3 x 64 x 112 values in a layer."""
    model = build("llama", num_key_value_heads=4, intermediate_size=112)
    convert(model, "exact")
    inputs = batch(tokens=4, rows=1)

    def step() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(**inputs).loss

    before, after = next(iter(measure(model, step, 4).layers.values()))
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 112)
    assert before > weights
    assert after < weights / 4


def assert_matches(plain: nn.Module, converted: nn.Module, exact: bool) -> None:
    inputs = batch()
    loss, gradients = loss_and_gradients(plain, inputs)
    ours, our_gradients = loss_and_gradients(converted, inputs)
    assert torch.equal(loss, ours)
    assert gradients.keys() == our_gradients.keys()
    if exact:
        assert all(torch.equal(g, our_gradients[name]) for name, g in gradients.items())


@pytest.mark.parametrize("tier", ["exact", "fp8_recompute"])
def test_frozen_parts_get_no_gradient_and_keep_nothing(tier: str) -> None:
    model = build("llama", num_hidden_layers=3, tie_word_embeddings=True)
    model.requires_grad_(False)
    model.model.layers[1].mlp.requires_grad_(True)
    model.model.layers[2].self_attn.q_proj.requires_grad_(True)
    converted = twin(model, lambda m: convert(m, tier))
    assert_matches(model, converted, exact=tier == "exact")
    inputs = batch()
    layers = measure(converted, lambda: converted(**inputs), 48).layers
    assert layers["model.layers.0"] == (0, 0)
    assert layers["model.layers.1"][1] < layers["model.layers.1"][0]


def test_a_frozen_linear_keeps_no_input() -> None:
    """Of frozen projections there remain q, k, v and out, gate and up; and the inputs of the trained norms."""
    model = build("llama", num_key_value_heads=4, head_dim=16)
    for name, p in model.named_parameters():
        p.requires_grad_("norm" in name)
    convert(model, "exact")
    inputs = batch()
    _, after = measure(model, lambda: model(**inputs), 48).layers["model.layers.1"]
    values = 2 * 64 + 4 * 64 + 2 * 112
    log_sum_exp = 4
    assert after == 48 * 4 * (values + log_sum_exp)


def test_gradient_through_inputs_embeds() -> None:
    model = build("llama")
    converted = twin(model, lambda m: convert(m, "exact"))
    embeds = torch.randn(2, 8, 64, requires_grad=True)
    gradients = [
        torch.autograd.grad(m(inputs_embeds=embeds).logits.square().mean(), embeds)[0] for m in (model, converted)
    ]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("tier", ["exact", "fp8", "fp8_recompute"])
def test_backward_twice_over_one_graph(tier: str) -> None:
    model = build("llama")
    convert(model, tier)
    loss = model(**batch()).loss
    loss.backward(retain_graph=True)
    once = {n: p.grad.clone() for n, p in model.named_parameters()}
    loss.backward()
    assert all(torch.equal(2 * once[n], p.grad) for n, p in model.named_parameters())


def test_gradient_of_a_gradient() -> None:
    model = build("llama", torch.float64)
    embeds = torch.randn(1, 4, 64, dtype=torch.float64, requires_grad=True)

    def curvature(m: Any) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            (g,) = torch.autograd.grad(m(inputs_embeds=embeds).logits.square().mean(), embeds, create_graph=True)
            return torch.autograd.grad(g.square().sum(), embeds)[0]

    plain = curvature(model)
    convert(model, "exact")
    assert torch.equal(curvature(model), plain)
    assert plain.abs().max() > 0


@pytest.mark.parametrize("tier", ["exact", "fp8_recompute"])
def test_weights_stepped_inside_backward(tier: str) -> None:
    """An optimizer that steps each weight as its gradient arrives finds the values that need it already computed."""
    model = build("llama")

    def step(p: Tensor) -> None:
        with torch.no_grad():
            p.add_(p.grad if p.grad is not None else 0, alpha=-1)

    def train(m: Any) -> dict[str, Tensor]:
        for p in m.parameters():
            p.register_post_accumulate_grad_hook(step)
        loss_and_gradients(m, batch())
        return dict(m.named_parameters())

    plain, ours = train(copy.deepcopy(model)), train(twin(model, lambda m: convert(m, tier)))
    largest = max((plain[n] - p).norm() / p.norm() for n, p in ours.items())
    # fp8_recompute differs by its rounding; 10 % of a step of length one gradient would be a weight used after its step
    assert largest == 0 if tier == "exact" else largest < 0.1


def test_a_weight_changed_before_backward_is_an_error() -> None:
    model = build("llama")
    convert(model, "exact")
    loss = model(**batch()).loss
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.add_(1)
    with pytest.raises(RuntimeError, match="Step the optimizer after backward"):
        loss.backward()


def test_an_activation_changed_before_backward_is_an_error() -> None:
    model = build("llama")
    convert(model, "exact")
    caught: list[Tensor] = []
    model.model.layers[1].register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    loss = model(**batch()).loss
    with torch.no_grad():
        caught[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_dropout_draws_the_same_mask_again() -> None:
    model = build("gpt2", resid_pdrop=0.3, attn_pdrop=0.0, embd_pdrop=0.2)
    converted = twin(model, lambda m: convert(m, "exact"))
    assert_equal_to_plain(model, converted, batch())
