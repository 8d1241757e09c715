"""Caches in training: `checkpoint_fp8` treats them as HuggingFace's checkpointing does, in hybrid models, too."""

import copy
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from hf_lowmem.activations import convert
from hf_lowmem.activations.checkpoint import wrap_layer
from tests.activations.models import SMALL, batch, build, loss_and_gradients

MAMBA: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 8}
# Attention beside recurrences, whose states stand in the cache, or (RecurrentGemma) in the module itself.
HYBRID: dict[str, tuple[str, dict[str, Any]]] = {
    "NemotronH": ("NemotronHForCausalLM", {
        "hybrid_override_pattern": "M-*-", "num_hidden_layers": 4, "mamba_num_heads": 4, "mamba_head_dim": 32,
        "ssm_state_size": 8, "n_groups": 1}),
    "RecurrentGemma": ("RecurrentGemmaForCausalLM", {
        "num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 16}),
    "Jamba": ("JambaForCausalLM", {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "num_experts": 2, "head_dim": None,
        "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False}),
    "Bamba": ("BambaForCausalLM", {"attn_layer_indices": [1], "head_dim": None, **MAMBA}),
    "FalconH1": ("FalconH1ForCausalLM", {"mamba_d_ssm": 64, **MAMBA, "mamba_d_head": 16}),
    "Zamba2": ("Zamba2ForCausalLM", {
        "layers_block_type": ["mamba", "hybrid"], "mamba_ngroups": 1, "n_mamba_heads": 4, "mamba_d_state": 8,
        "num_mem_blocks": 1, "use_mem_eff_path": False, "head_dim": None}),
    "Lfm2": ("Lfm2ForCausalLM", {"full_attn_idxs": [1], "head_dim": None}),
    "Mamba": ("MambaForCausalLM", {"state_size": 8, "head_dim": None, "intermediate_size": None}),
}  # fmt: skip


def hybrid(name: str) -> Any:
    cls, own = HYBRID[name]
    torch.manual_seed(0)
    model = getattr(transformers, cls)
    config = model.config_class(**{k: v for k, v in (SMALL | own).items() if v is not None})
    return model(config).train()


@pytest.mark.parametrize("name", HYBRID)
def test_a_hybrid_trains_as_under_checkpointing(name: str) -> None:
    """Called as in a loop of one's own, where use_cache is True by default."""
    model = hybrid(name)
    plain, theirs, exact = (copy.deepcopy(model) for _ in range(3))
    loss, gradients = loss_and_gradients(plain, batch() | {"use_cache": False})
    theirs.gradient_checkpointing_enable({"use_reentrant": False})
    loss_of_theirs, gradients_of_theirs = loss_and_gradients(theirs, batch())
    report = convert(model, "checkpoint_fp8")
    for layer in report.layers:
        wrap_layer(exact.get_submodule(layer.name), "none")
    ours, our_gradients = loss_and_gradients(exact, batch())
    assert torch.equal(loss, ours)
    assert torch.equal(loss, loss_of_theirs)
    assert our_gradients.keys() == gradients.keys()
    for n, g in our_gradients.items():
        assert torch.equal(g, gradients_of_theirs[n]), n
    lossy, lossy_gradients = loss_and_gradients(model, batch() | {"use_cache": True})
    flat, found = (torch.cat([g[n].flatten() for n in gradients]) for g in (gradients, lossy_gradients))
    assert torch.equal(lossy, loss)
    assert (flat - found).norm() < 0.08 * flat.norm()


# What Layer was called with. In the module it would be state, which the second pass has as the first had it.
CALLS: list[Any] = []


class Layer(nn.Module):
    """Takes everything by position."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.layer_idx = 0

    def forward(self, hidden: Tensor, use_cache: bool = False, cache: Any = None, *rest: Any) -> Tensor:
        CALLS.append((use_cache, cache, rest))
        return self.linear(hidden)


class States:
    """A cache of a recurrence: it has layers, and no length to tell."""

    def __init__(self, *states: Tensor) -> None:
        self.layers = [SimpleNamespace(states=list(states))]

    def get_seq_length(self, layer: int = 0) -> int:
        raise ValueError("get_seq_length can only be called on attention layers")


@pytest.mark.parametrize(
    ("args", "kwargs", "seen"),
    [
        ((True,), {}, (False, None, ())),
        ((), {"use_cache": True}, (False, None, ())),
        ((True, transformers.DynamicCache()), {}, (False, None, ())),
        ((), {"cache": transformers.DynamicCache()}, (False, None, ())),
        ((False, None, transformers.DynamicCache(), 7), {}, (False, None, (None, 7))),
        ((False, ()), {}, (False, None, ())),  # a legacy cache: a tuple with nothing in it
    ],
)
def test_an_empty_cache_is_taken_away_wherever_it_stands(args: Any, kwargs: Any, seen: Any) -> None:
    CALLS.clear()
    layer = Layer()
    wrap_layer(layer, "none")
    x = torch.randn(2, 3, 8, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        layer(x, *args, **kwargs).sum().backward()
    first, second = CALLS
    assert first == second == seen, "in both passes"


@pytest.mark.parametrize("cache", [States(torch.ones(2, 4)), (torch.ones(2, 4), torch.ones(2, 4))])
@pytest.mark.parametrize("by_name", [False, True])
def test_a_cache_with_states_is_refused(cache: Any, by_name: bool) -> None:
    layer = Layer()
    wrap_layer(layer, "none")
    x = torch.randn(2, 3, 8, requires_grad=True)
    with pytest.raises(ValueError, match=r"a key-value cache that holds tokens \(cache\).*use_cache=False"):
        layer(x, cache=cache) if by_name else layer(x, False, cache)


@pytest.mark.parametrize("name", ["cache", "past_key_values", "past_key_value", "layer_past", "cache_params"])
def test_every_name_of_5_17_to_5_24_is_known(name: str) -> None:
    seen: list[Any] = []

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
            seen.append(kwargs[name])
            return self.linear(hidden_states)

    layer = Named()
    wrap_layer(layer, "none")
    with pytest.warns(UserWarning, match="no key-value cache is filled"):
        layer(torch.randn(2, 3, 8, requires_grad=True), **{name: transformers.DynamicCache()}).sum().backward()
    assert seen == [None, None]


def test_prefix_tuning_is_refused_in_words() -> None:
    model = build("llama")
    ids = batch()["input_ids"]
    with torch.no_grad():
        outputs = model.eval()(ids, use_cache=True)
    past = outputs.cache if hasattr(outputs, "cache") else outputs.past_key_values
    name = "cache" if hasattr(outputs, "cache") else "past_key_values"
    convert(model.train(), "checkpoint_fp8")
    with pytest.raises(ValueError, match="holds tokens"):
        model(ids, **{name: past})
