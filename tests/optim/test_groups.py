"""Which parameters take which rule, on real architectures."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig, Qwen2Config, T5Config
from transformers import T5ForConditionalGeneration as T5

from hf_lowmem.optim import make_optimizer
from hf_lowmem.optim.groups import linear_weights
from tests.conftest import Mixed, tiny_llama

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def low_rank_names(model: nn.Module, **kwargs: Any) -> set[str]:
    optimizer = make_optimizer("apollo_mini", model, **kwargs)
    return {n for g in optimizer.param_groups if g["rank"] is not None for n in g["param_names"]}


def all_names(model: nn.Module, **kwargs: Any) -> list[str]:
    return [n for g in make_optimizer("apollo_mini", model, **kwargs).param_groups for n in g["param_names"]]


def test_llama_tied_and_untied() -> None:
    for tied in (True, False):
        model = tiny_llama(tie_word_embeddings=tied)
        low = low_rank_names(model)
        assert low == {n for n, p in model.named_parameters() if n.endswith("_proj.weight")}
        assert sorted(all_names(model)) == sorted(n for n, _ in model.named_parameters())


def test_gpt2_s_conv1d() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=16))
    low = low_rank_names(model)
    assert low == {f"transformer.h.0.{n}.weight" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}


def test_fused_experts() -> None:
    model = AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, num_local_experts=4))
    low = low_rank_names(model)
    fused = {n for n, p in model.named_parameters() if p.ndim == 3}
    assert fused
    assert fused <= low
    assert not any("embed" in n or "lm_head" in n or "norm" in n for n in low)


def test_encoder_decoder() -> None:
    model = T5(T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=64))
    low = low_rank_names(model)
    assert "shared.weight" not in low
    assert "lm_head.weight" not in low
    assert any(n.endswith("DenseReluDense.wi.weight") for n in low)


def test_lora_through_a_peft_wrapper() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=8, target_modules="all-linear"))
    low = low_rank_names(model)
    assert low
    assert all(".lora_A." in n or ".lora_B." in n for n in low)


def test_a_convolution_and_a_bilinear_map_are_no_experts() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bilinear, self.linear = nn.Conv1d(8, 8, 3), nn.Bilinear(8, 8, 8), nn.Linear(8, 8)

    assert low_rank_names(Net()) == {"linear.weight"}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (None, "q k v o gate up down"),
        ("all-linear", "q k v o gate up down"),
        ("all_linear", "q k v o gate up down"),
        (["q_proj", "v_proj"], "q v"),
        (r".*\.(k|o)_proj", "k o"),
        ([r".*mlp\.up_proj"], "up"),
    ],
    ids=str,
)
def test_targets_are_read_as_huggingface_reads_them(targets: Any, expected: str) -> None:
    low = low_rank_names(tiny_llama(), target_modules=targets)
    assert {n.split(".")[-2].removesuffix("_proj") for n in low} == set(expected.split())


def test_the_head_s_own_name_does_not_matter() -> None:
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SIZES, tie_word_embeddings=False))
    assert model.get_output_embeddings() is model.lm_head
    assert "lm_head" not in {m for m, _, _ in linear_weights(model)}


def test_groups_split_by_decay_and_rule() -> None:
    optimizer = make_optimizer("apollo", Mixed(), rank=4, weight_decay=0.25)
    rows = {(g["rank"], g["weight_decay"]): set(g["param_names"]) for g in optimizer.param_groups}
    assert rows == {
        (4, 0.25): {"linear.weight", "wide.weight", "experts"},
        (None, 0.25): {"empty", "strided", "odd"},
        (None, 0.0): {"scalar", "vector", "long_vector", "linear.bias"},
    }


def test_a_default_rank_that_leaves_nothing_is_told() -> None:
    with pytest.warns(UserWarning, match="rank=256"):
        optimizer = make_optimizer("apollo", tiny_llama())
    assert all(g["rank"] is None for g in optimizer.param_groups)


def test_streams_belong_to_names_not_to_places() -> None:
    """A layer more, or another order, changes nobody else's projection."""

    def keys(model: nn.Module) -> dict[str, int]:
        optimizer = make_optimizer("apollo_mini", model, seed=3)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        named = {n: p for g in optimizer.param_groups for n, p in zip(g["param_names"], g["params"], strict=True)}
        return {n: optimizer.state[p]["key"] for n, p in named.items() if "key" in optimizer.state[p]}

    one, two = keys(tiny_llama()), keys(tiny_llama(num_hidden_layers=2))
    assert one.items() <= two.items()
    assert len(set(two.values())) == len(two) == 14
