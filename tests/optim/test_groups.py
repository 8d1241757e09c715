"""Which parameters take which rule, on real architectures."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    FunnelConfig,
    FunnelModel,
    GPT2Config,
    GptOssConfig,
    HubertConfig,
    HubertModel,
    Llama4TextConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2Config,
    Qwen3MoeConfig,
    T5Config,
    ViTConfig,
    ViTModel,
    XLNetConfig,
    XLNetModel,
)
from transformers import T5ForConditionalGeneration as T5

from hf_lowmem import LowMemTrainingArguments
from hf_lowmem.optim import from_spec, make_optimizer
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


MOE: dict[str, Any] = SIZES | {"moe_intermediate_size": 24, "num_experts_per_tok": 2, "head_dim": 8}


@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(**SIZES, num_local_experts=4),
        Qwen3MoeConfig(**MOE, num_experts=4),
        GptOssConfig(**MOE, num_local_experts=4),
        OlmoeConfig(**SIZES, num_experts=4),
        DeepseekV3Config(**MOE, n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1),
    ],
    ids=lambda c: c.model_type,
)
def test_experts_are_batches_of_matrices_for_every_method(config: Any) -> None:
    model = AutoModelForCausalLM.from_config(config)
    fused = {n for n, p in model.named_parameters() if p.ndim == 3}
    assert fused
    assert fused <= low_rank_names(model)
    for name in ("soap", "lamb"):
        groups = make_optimizer(name, model).param_groups
        assert {n for g in groups if g["experts"] for n in g["param_names"]} == fused
        assert len(groups) == 3
    assert len(make_optimizer("adamw", model).param_groups) == 2, "all alike to it"


def vision(kind: str) -> nn.Module:
    small: dict[str, Any] = {
        "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64
    }  # fmt: skip
    speech: dict[str, Any] = {
        "conv_dim": (32,), "conv_stride": (2,), "conv_kernel": (3,), "num_feat_extract_layers": 1,
        "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
    }  # fmt: skip
    makers: dict[str, Callable[[], nn.Module]] = {
        "position embeddings": lambda: ViTModel(ViTConfig(image_size=32, patch_size=8, **small)),
        "a weight-normed convolution": lambda: HubertModel(
            HubertConfig(**small, **speech)
        ),
        "heads as a dimension": lambda: XLNetModel(
            XLNetConfig(vocab_size=64, d_model=64, n_layer=1, n_head=4, d_inner=64)
        ),
        "heads of a funnel": lambda: FunnelModel(
            FunnelConfig(vocab_size=64, block_sizes=[1], d_model=64, n_head=4, d_head=16, d_inner=64)
        ),
        "a convolution": lambda: nn.Sequential(nn.Conv1d(64, 64, 3), nn.Linear(64, 64)),
    }  # fmt: skip
    return makers[kind]()


@pytest.mark.parametrize(
    "kind",
    [
        "position embeddings",
        "a weight-normed convolution",
        "heads as a dimension",
        "heads of a funnel",
        "a convolution",
    ],
)
def test_other_parameters_of_three_dimensions_are_no_experts(kind: str) -> None:
    model = vision(kind)
    three = {n for n, p in model.named_parameters() if p.ndim == 3}
    assert three
    assert not three & low_rank_names(model)
    assert low_rank_names(model)
    for name in ("soap", "lamb"):
        optimizer = make_optimizer(name, model)
        assert not any(g["experts"] for g in optimizer.param_groups)
    soap = make_optimizer("soap", model)
    for group in soap.param_groups:
        for n, p in zip(group["param_names"], group["params"], strict=True):
            if n in three:
                assert soap.state_bytes(p, group) <= 8 * p.numel() + 16, "Adam's moments, and two numbers"


def test_a_module_of_ones_own_says_how_many_experts_it_has() -> None:
    class Mine(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.num_experts = count
            self.up = nn.Parameter(torch.randn(4, 16, 8))
            self.bias = nn.Parameter(torch.randn(4, 1, 8))  # no matrix: a SOAP basis of its side would be 8 x 8 each

    assert low_rank_names(nn.Sequential(Mine(4), nn.Linear(8, 8))) == {"0.up", "1.weight"}
    assert low_rank_names(nn.Sequential(Mine(3), nn.Linear(8, 8))) == {"1.weight"}
    groups = make_optimizer("soap", Mine(4)).param_groups
    assert [n for g in groups if g["experts"] for n in g["param_names"]] == ["up"]


class Fused(nn.Module):
    """Experts as Llama 4's: nothing says which way round the matrices are."""

    def __init__(self, size: int, inside: int, *, across: bool, named: str = "num_experts") -> None:
        super().__init__()
        setattr(self, named, 4)
        up, down = (4, 2 * inside, size), (4, size, inside)
        self.gate_up_proj, self.down_proj = (
            nn.Parameter(torch.randn((s[0], s[2], s[1]) if across else s)) for s in (up, down)
        )


@pytest.mark.parametrize("sizes", [(16, 8), (8, 16), (16, 16), (32, 16)])
@pytest.mark.parametrize("across", [True, False])
def test_experts_that_do_not_say_which_way_round_they_are_show_it_by_their_shapes(
    sizes: tuple[int, int], across: bool
) -> None:
    for name in ("scale", "adam_mini", "muon"):
        groups = make_optimizer(name, Fused(*sizes, across=across)).param_groups
        assert {g["outputs"] for g in groups} == {-1 if across else -2}
    model = Fused(*sizes, across=across)
    vars(model)["is_transposed"] = not across
    assert {g["outputs"] for g in make_optimizer("scale", model).param_groups} == {-2 if across else -1}, "as it says"


def test_llama_4_s_experts_have_their_outputs_last() -> None:
    sizes: dict[str, Any] = SIZES | {"head_dim": 8, "intermediate_size_mlp": 48}
    config = Llama4TextConfig(**sizes, num_local_experts=4)
    groups = make_optimizer("scale", AutoModelForCausalLM.from_config(config)).param_groups
    outputs = {n: g["outputs"] for g in groups for n in g["param_names"]}
    fused = {n for n in outputs if "experts.gate_up_proj" in n or "experts.down_proj" in n}
    assert fused
    assert {n for n, dim in outputs.items() if dim == -1} == fused


@pytest.mark.parametrize("named", ["num_routed_experts", "total_experts", "n_shared_experts"])
def test_other_names_of_the_number_of_experts(named: str) -> None:
    assert low_rank_names(Fused(16, 8, across=False, named=named)) == {"gate_up_proj", "down_proj"}


def test_what_the_model_says_of_experts_cannot_be_set() -> None:
    for name in ("soap", "lamb"):
        with pytest.raises(ValueError, match=r"experts=True has no effect.*num_experts"):
            make_optimizer(name, nn.Linear(8, 8), experts=True)


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


def test_a_rank_that_leaves_weights_out_is_told_once_with_numbers_and_a_remedy() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 8), nn.Linear(8, 64))
    with pytest.warns(UserWarning, match="galore") as caught:
        make_optimizer("galore", model, rank=8)
    assert [str(w.message) for w in caught] == [
        "name='galore' with rank=8: 2 of 4 linear weights (1,024 parameters) have no smaller side above it and "
        "take plain Adam with whole moments. Set rank=2 (a quarter of 8, their median smaller side) or another below 8."
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_optimizer("galore", model, rank=8)  # it was told
        make_optimizer("galore", model, rank=2)
    with pytest.warns(UserWarning, match="all 4 linear weights .* nothing is saved"):
        make_optimizer("galore", model)
    with pytest.warns(UserWarning, match=r"no trainable linear weight.*Choose 'adamw'"):
        make_optimizer("galore", nn.LayerNorm(64))


def test_a_rank_is_told_by_the_names_of_the_fields() -> None:
    args = LowMemTrainingArguments("out", use_cpu=True, report_to=[], optim="apollo")
    with pytest.warns(UserWarning, match=r"optim='apollo' with its default rank=256: all .* Set lowmem_rank="):
        from_spec(args.lowmem_optim_spec(), tiny_llama())


@pytest.mark.parametrize("saved", [["lm_head"], ["lm_head", "embed_tokens"]], ids=str)
@pytest.mark.parametrize("active", ["default", "second"])
@pytest.mark.parametrize("wrap", [False, True])
def test_heads_of_every_adapter_are_left_to_adam(saved: list[str], active: str, wrap: bool) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=saved)
    model = get_peft_model(tiny_llama(tie_word_embeddings=False), config)
    for name in ("second", "third"):
        model.add_adapter(name, config)
    model.set_adapter(active)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name or "modules_to_save" in name)
    low = low_rank_names(nn.DataParallel(model) if wrap else model)
    assert len(low) == 3 * 2
    assert all("lora_" in n for n in low)


def test_trainable_tokens_and_the_head_under_them_are_left_to_adam() -> None:
    config = LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2], "lm_head": [3]}
    )
    model = get_peft_model(tiny_llama(tie_word_embeddings=False), config)
    for p in model.parameters():
        p.requires_grad_(True)
    low = low_rank_names(model)
    assert not any("lm_head" in n or "embed_tokens" in n for n in low)
    assert any("lora_A" in n for n in low)


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


@pytest.mark.parametrize(
    ("field", "value", "said"), [("lowmem_state", "8bit", "state='8bit'"), ("learning_rate", 0.001, "lr=0.001")]
)
def test_names_of_training_arguments_have_an_answer(field: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"{field}=.* here it is {said}"):
        make_optimizer("adamw", nn.Linear(4, 4), **{field: value})
