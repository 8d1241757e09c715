"""Which list of layers is the decoder's, what needs no structure, and what a report calls experts."""

from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

from hf_lowmem.activations import convert, undo
from hf_lowmem.activations.detect import find_repeated, find_stack, routing_of
from hf_lowmem.memory import measure_saved
from hf_lowmem.specs import TIERS
from tests.activations.models import batch, build, loss_and_gradients

TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
SIGLIP, LLAMA, OPT = (
    VISION | {"model_type": "siglip_vision_model"},
    TEXT | {"model_type": "llama"},
    TEXT | {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32},
)
QFORMER = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"} | {"encoder_hidden_size": 64}

# model class: (config, the decoder's layers). In all of them the vision tower's weights outweigh the decoder's.
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "LlavaOnevisionForConditionalGeneration": (
        {"text_config": TEXT | {"model_type": "qwen2"}, "vision_config": SIGLIP},
        "model.language_model.layers",
    ),
    "PaliGemmaForConditionalGeneration": (
        {"text_config": TEXT | {"model_type": "gemma", "head_dim": 16}, "vision_config": SIGLIP},
        "model.language_model.layers",
    ),
    "Idefics3ForConditionalGeneration": (
        {"text_config": LLAMA, "vision_config": VISION | {"model_type": "idefics3_vision"}},
        "model.text_model.layers",
    ),
    "Blip2ForConditionalGeneration": (
        {"text_config": OPT, "vision_config": VISION, "qformer_config": QFORMER},
        "language_model.model.decoder.layers",
    ),
    # Text and image layers are both inside what the model calls its decoder.
    "GitForCausalLM": (
        {k: v for k, v in TEXT.items() if k != "num_key_value_heads"} | {"vision_config": VISION},
        "git.encoder.layer",
    ),
    "WhisperForConditionalGeneration": (
        {"vocab_size": 96, "d_model": 32, "encoder_layers": 6, "decoder_layers": 2, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 96, "decoder_ffn_dim": 32, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
        "model.decoder.layers",
    ),
    # Two towers, none of which makes tokens: the heavier one, as for any other model.
    "CLIPModel": ({"text_config": TEXT, "vision_config": VISION}, "vision_model.encoder.layers"),
}  # fmt: skip


def on_meta(name: str) -> Any:
    cls = getattr(transformers, name)
    with torch.device("meta"):
        return cls(cls.config_class(**MODELS[name][0]))


@pytest.mark.parametrize("name", MODELS)
def test_the_decoder_is_the_part_that_makes_the_tokens(name: str) -> None:
    model, expected = on_meta(name), MODELS[name][1]
    weights = {
        n: sum(p.numel() for p in model.get_submodule(n).parameters()) for n in (expected, *find_stack(model)[2])
    }
    assert find_stack(model)[0] == expected
    assert weights[expected] < max(weights.values()) or name == "CLIPModel", "or size alone would have found it"
    report = convert(model.train(), "fp8")
    assert all(layer.name.startswith(expected) for layer in report.layers)
    assert expected not in report.others
    assert all(expected in why for why in report.others.values())


class Wrapped(nn.Module):
    """A model of somebody's around one of transformers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


@pytest.mark.parametrize("how", ["wrapper", "peft", "base"])
def test_it_is_found_inside_of_wrappers(how: str) -> None:
    name = "LlavaOnevisionForConditionalGeneration"
    model, expected = on_meta(name), MODELS[name][1]
    if how == "wrapper":
        assert find_stack(Wrapped(model))[0] == f"inner.{expected}"
    elif how == "peft":
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
        assert find_stack(adapted)[0] == f"base_model.model.{expected}"
    else:  # without a head, as for a reward model
        assert find_stack(model.model)[0] == "language_model.layers"


class Tower(nn.Module):
    """An image model of four heavy attention layers before a decoder of two recurrent ones."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = build("llama", num_hidden_layers=4)
        self.decoder = nn.Module()
        self.decoder.tokens = nn.Embedding(16, 8)
        self.decoder.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))

    def get_decoder(self) -> nn.Module:
        return self.decoder

    def get_input_embeddings(self) -> Any:
        return self.decoder.tokens

    def get_output_embeddings(self) -> Any:
        return self.decoder.tokens


def test_a_decoder_that_is_not_recognised_is_not_replaced_by_a_tower() -> None:
    model = Tower()
    with pytest.raises(ValueError, match=r"no stack of decoder layers .* in Tower.*'checkpoint_fp8' or 'hooks_fp8'"):
        convert(model, "fp8")
    report = convert(model, "hooks_fp8")
    assert [layer.name for layer in report.layers] == ["decoder.blocks.0", "decoder.blocks.1"]


def test_a_head_that_is_called_decoder_is_none() -> None:
    """ModernBERT's decoder models: `get_decoder` gives the output layer."""
    small = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
    config = transformers.ModernBertDecoderConfig(**small, sep_token_id=2, cls_token_id=1)
    with torch.device("meta"):
        model = transformers.ModernBertDecoderForCausalLM(config)
    assert find_stack(model)[0] == "model.layers"


class Part(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 64)

    def forward(self, x: Any) -> Any:
        return nn.functional.gelu(self.linear(x))


class Net(nn.Module):
    """No list of anything."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Part(8)
        self.second = Part(64)
        self.out = nn.Sequential(nn.LogSoftmax(-1))
        self.head = nn.AdaptiveLogSoftmaxWithLoss(64, 96, [16])

    def forward(self, input_ids: Any, labels: Any) -> Any:
        x = self.second(self.first(torch.nn.functional.one_hot(input_ids % 8, 8).float()))
        return SimpleNamespace(loss=self.head(x.flatten(0, 1), labels.flatten()).loss)


def structureless(name: str) -> Any:
    """Models in whose layers no attention is recognised."""
    torch.manual_seed(0)
    small: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2}
    tokens: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if name == "net":
        return Net().train()
    if name == "mamba":
        return transformers.MambaForCausalLM(transformers.MambaConfig(**small, state_size=8)).train()
    if name == "mamba2":
        config = transformers.Mamba2Config(**small, state_size=8, num_heads=4, head_dim=32, n_groups=1, chunk_size=8)
        return transformers.Mamba2ForCausalLM(config).train()
    if name == "rwkv":
        config = transformers.RwkvConfig(**small, attention_hidden_size=64, context_length=64)
        return transformers.RwkvForCausalLM(config).train()
    if name == "fnet":
        config = transformers.FNetConfig(**small, intermediate_size=112, **tokens, hidden_dropout_prob=0.0)
        return transformers.FNetForMaskedLM(config).train()
    if name == "xlnet":
        config = transformers.XLNetConfig(vocab_size=96, d_model=64, n_layer=2, n_head=4, d_inner=112, dropout=0.0)
        return transformers.XLNetLMHeadModel(config).train()
    raise AssertionError(name)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "rwkv", "fnet", "xlnet", "net"])
@pytest.mark.parametrize("tier", ["hooks_fp8", "checkpoint_fp8"])
def test_two_tiers_need_no_structure(name: str, tier: str) -> None:
    model = structureless(name)
    if name == "net" and tier == "checkpoint_fp8":
        with pytest.raises(ValueError, match=r"Net has no list of layers. Set lowmem_activations='hooks_fp8'"):
            convert(model, tier)
        return
    inputs = batch(tokens=48)
    with measure_saved(model) as before:
        loss, gradients = loss_and_gradients(model, inputs)
    report = convert(model, tier)
    assert {layer.tier for layer in report.layers} == {tier}
    with measure_saved(model) as after:
        ours, our_gradients = loss_and_gradients(model, inputs)
    assert torch.equal(loss, ours)
    flat, our_flat = (torch.cat([g[n].flatten() for n in gradients]) for g in (gradients, our_gradients))
    assert (flat - our_flat).norm() < 0.08 * flat.norm()
    assert after.peak < before.peak
    undo(model)
    assert all("forward" not in vars(module) for module in model.modules())


def test_losses_are_no_layers() -> None:
    assert [name for name, _ in find_repeated(Net())[1]] == ["first", "second"]
    assert [name for name, _ in find_repeated(Wrapped(Net()))[1]] == ["inner.first", "inner.second"]
    assert [name for name, _ in find_repeated(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))[1]] == ["0", "1"]


def test_layers_of_a_mixture_that_need_structure_are_said_to() -> None:
    report = convert(structureless("mamba"), "fp8:0,hooks_fp8:1")
    assert [layer.tier for layer in report.layers] == [None, "hooks_fp8"]
    assert "hooks_fp8" in report.layers[0].left[""]


TARGETS = ["gate_proj", "up_proj", "down_proj", "q_proj", "o_proj"]
ADAPTERS: dict[str, Any] = {
    "C3A": lambda: peft.C3AConfig(block_size=16, target_modules=TARGETS),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=TARGETS),
    "VB-LoRA": lambda: peft.VBLoRAConfig(
        r=2, num_vectors=8, vector_length=16, topk=2, target_modules=["q_proj", "o_proj"]
    ),
    "RandLoRA": lambda: peft.RandLoraConfig(r=4, target_modules=TARGETS),
    "GraLoRA": lambda: peft.GraloraConfig(r=4, gralora_k=2, target_modules=TARGETS),
}


@pytest.fixture
def _compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft sets CC and CXX while it compiles BOFT's extension, and leaves them so where that fails."""
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("_compilers")
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_three_dimensions_is_part_of_its_linear(name: str) -> None:
    model = peft.get_peft_model(build("llama"), ADAPTERS[name]()).train()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn_like(p))
    loss, gradients = loss_and_gradients(model, batch())
    flat = torch.cat([g.flatten() for g in gradients.values()])
    for tier in TIERS:
        report = convert(model, tier)
        if tier not in ("checkpoint_fp8", "hooks_fp8"):
            assert all({"attention", "mlp"} <= layer.handled.keys() for layer in report.layers)
        ours, our_gradients = loss_and_gradients(model, batch())
        off = (flat - torch.cat([our_gradients[n].flatten() for n in gradients])).norm() / flat.norm()
        assert torch.equal(loss, ours)
        assert off == 0 if tier == "exact" else off < 0.25, tier  # RandLoRA's small matrices are the worst


class Mixture(nn.Module):
    """Experts as remote code has them: a list of MLPs behind a router."""

    def __init__(self, name: str) -> None:
        super().__init__()
        mlps = [nn.ModuleDict({"up_proj": nn.Linear(8, 8), "down_proj": nn.Linear(8, 8)}) for _ in range(2)]
        self.add_module(name, nn.ModuleList(mlps))


class Indexed(nn.Module):
    """Attention to the few keys of highest score."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.index_topk = nn.Linear(8, 8), 4


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (Mixture("experts"), "experts ('experts')"),
        (Mixture("branches"), "a list of MLPs ('branches')"),
        (Indexed(), "a choice by rank ('index_topk')"),
        (nn.Conv1d(8, 8, 3), None),
        (nn.MultiheadAttention(8, 2), None),
    ],
)
def test_what_may_route_is_named(layer: nn.Module, expected: str | None) -> None:
    assert routing_of(layer) == expected


HYBRID: dict[str, tuple[str, str, dict[str, Any]]] = {
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        "RecurrentGemmaForCausalLM",
        {"num_hidden_layers": 3, "lru_width": 64, "head_dim": 16, "attention_window_size": 16},
    ),
    "lfm2": ("Lfm2Config", "Lfm2ForCausalLM", {"full_attn_idxs": [1]}),
    "falcon_h1": (
        "FalconH1Config",
        "FalconH1ForCausalLM",
        {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8},
    ),
    "granitemoehybrid, dense": (
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        {"layer_types": ["mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 64,
         "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8, "mamba_n_groups": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HYBRID)
def test_a_report_speaks_of_experts_only_where_there_are_some(name: str) -> None:
    config, cls, own = HYBRID[name]
    from tests.activations.models import SMALL

    with torch.device("meta"):
        model = getattr(transformers, cls)(getattr(transformers, config)(**SMALL | own)).train()
    for tier in ("checkpoint_fp8", "fp8"):
        report = convert(model, tier)
        assert "experts" not in str(report)
        if tier == "checkpoint_fp8":
            assert all(not layer.left for layer in report.layers), "its input is compressed"


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_input_of_experts_is_kept_exactly(family: str) -> None:
    report = convert(build(family), "checkpoint_fp8")
    assert all("experts" in layer.left[""] for layer in report.layers)
