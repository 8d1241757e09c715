"""Modules that stand twice in a model: converted once, undone wholly, right."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from hf_lowmem.activations import convert, undo
from hf_lowmem.activations.blocks import patches, put_back, take_out
from hf_lowmem.specs import TIERS
from tests.activations.models import batch, build, loss_and_gradients
from tests.activations.test_convert import forwards
from tests.activations.test_hunt import LOSSY, error_of


def layers(m: Any) -> None:
    m.model.layers = nn.ModuleList([m.model.layers[0], m.model.layers[1], m.model.layers[0]])


def mlps(m: Any) -> None:
    for layer in m.model.layers:
        layer.mlp = m.model.layers[0].mlp


def attentions(m: Any) -> None:
    for layer in m.model.layers:
        layer.self_attn = m.model.layers[0].self_attn


def norms(m: Any) -> None:
    for layer in m.model.layers:
        layer.input_layernorm = layer.post_attention_layernorm = m.model.norm


@pytest.mark.parametrize("share", [layers, mlps, attentions, norms])
@pytest.mark.parametrize("tier", TIERS)
def test_shared_modules(tier: str, share: Callable[[Any], None]) -> None:
    model = build("llama", num_hidden_layers=3)
    share(model)
    before = {id(m): set(vars(m)) for m in model.modules()}
    # With a cache, a layer in two places would read the keys of the first in the second.
    model.config.use_cache = False
    _, truth = loss_and_gradients(model, batch())
    ours = copy.deepcopy(model)
    first = str(convert(ours, tier))
    found = forwards(ours)
    assert str(convert(ours, tier)) == first
    assert forwards(ours) == found
    _, gradients = loss_and_gradients(ours, batch())
    assert error_of(gradients, truth) < (1e-9 if tier == "exact" else LOSSY)
    convert(ours, "exact" if tier != "exact" else "fp8")
    undo(ours)
    assert not forwards(ours)
    convert(model, tier)
    undo(model)
    assert {id(m): set(vars(m)) for m in model.modules()} == before


def test_two_tiers_for_one_layer_are_refused() -> None:
    model = build("llama", num_hidden_layers=3)
    layers(model)
    with pytest.raises(ValueError, match=r"layers 0 and 2 are one and the same module, which cannot have two tiers"):
        convert(model, "fp8:0-1,exact:2")
    assert not forwards(model)
    convert(model, "fp8:0,exact:1,fp8:2")


def test_a_refusal_puts_everything_back_in_its_order() -> None:
    """A layer that is its own MLP has two forwards of ours, one around the other."""
    model = build("llama", num_hidden_layers=2)
    for layer in model.model.layers:
        layer.one, layer.two = nn.Linear(64, 64), nn.Linear(64, 64)
    convert(model, "fp8")
    first = list(patches(model))
    assert [type(patch).__name__ for patch in first[:2]] == ["Layer", "Block"]
    assert first[0].module is first[1].module
    found = take_out(model)
    assert not forwards(model)
    put_back(found)
    assert list(patches(model)) == first
