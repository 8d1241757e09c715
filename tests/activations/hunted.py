"""Models and circumstances for the hunt: forty families, built small from their configs, and five ways to train."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_lowmem.activations.detect import find_stack
from tests.activations.models import EXPERTS, FAMILIES, build

BERT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "num_channels": 3,
}
SPEECH: dict[str, Any] = BERT | {
    "conv_dim": (32, 32),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_feat_extract_layers": 2,
    "apply_spec_augment": False,
}
MOE: dict[str, Any] = {"num_experts_per_tok": 2, "num_experts": 4, "num_local_experts": 4}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 96,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 112,
    "decoder_ffn_dim": 112,
    "max_position_embeddings": 64,
}

# family: (config class, model class, config, kind of input)
OTHERS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "diffllama": ("DiffLlamaConfig", "DiffLlamaModel", BERT | {"num_key_value_heads": 2}, "text"),
    "bloom": ("BloomConfig", "BloomModel", {"vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 4}, "text"),
    "opt": ("OPTConfig", "OPTModel", BERT | {"ffn_dim": 112, "word_embed_proj_dim": 64}, "text"),
    "gpt_neo": (
        "GPTNeoConfig",
        "GPTNeoModel",
        {"vocab_size": 96, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]},
        "text",
    ),
    "gptj": (
        "GPTJConfig",
        "GPTJModel",
        {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
        "text",
    ),
    "falcon": (
        "FalconConfig",
        "FalconModel",
        {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        "text",
    ),
    "mpt": ("MptConfig", "MptModel", {"vocab_size": 96, "d_model": 64, "n_layers": 2, "n_heads": 4}, "text"),
    "olmoe": ("OlmoeConfig", "OlmoeModel", BERT | MOE | {"num_key_value_heads": 2}, "text"),
    "granitemoe": ("GraniteMoeConfig", "GraniteMoeModel", BERT | MOE | {"num_key_value_heads": 2}, "text"),
    "bert": ("BertConfig", "BertModel", BERT, "text"),
    "roberta": ("RobertaConfig", "RobertaModel", BERT | {"pad_token_id": 1}, "text"),
    "electra": ("ElectraConfig", "ElectraModel", BERT | {"embedding_size": 64}, "text"),
    "albert": ("AlbertConfig", "AlbertModel", BERT | {"embedding_size": 32}, "text"),
    "deberta_v2": (
        "DebertaV2Config",
        "DebertaV2Model",
        BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        "text",
    ),
    "modernbert": ("ModernBertConfig", "ModernBertModel", BERT | {"cls_token_id": 1, "sep_token_id": 2}, "text"),
    "mpnet": ("MPNetConfig", "MPNetModel", BERT, "text"),
    "t5": (
        "T5Config",
        "T5Model",
        {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 112, "num_layers": 2, "num_heads": 4},
        "seq2seq",
    ),
    "bart": ("BartConfig", "BartModel", SEQ2SEQ, "seq2seq"),
    "vit": ("ViTConfig", "ViTModel", VISION, "image"),
    "deit": ("DeiTConfig", "DeiTModel", VISION, "image"),
    "dinov2": ("Dinov2Config", "Dinov2Model", VISION | {"drop_path_rate": 0.3}, "image"),
    "beit": (
        "BeitConfig",
        "BeitModel",
        VISION | {"drop_path_rate": 0.3, "use_relative_position_bias": True, "vocab_size": 96},
        "image",
    ),
    "siglip": ("SiglipVisionConfig", "SiglipVisionModel", VISION, "image"),
    "clip": ("CLIPVisionConfig", "CLIPVisionModel", VISION, "image"),
    "wav2vec2": ("Wav2Vec2Config", "Wav2Vec2Model", SPEECH, "sound"),
    "hubert": ("HubertConfig", "HubertModel", SPEECH, "sound"),
    "wavlm": ("WavLMConfig", "WavLMModel", SPEECH | {"num_buckets": 8, "max_bucket_distance": 16}, "sound"),
    "whisper": (
        "WhisperConfig",
        "WhisperModel",
        SEQ2SEQ
        | {"num_mel_bins": 16, "max_source_positions": 12, "max_target_positions": 32}
        | dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1),
        "mel",
    ),
}
DECODERS = ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "cohere", "gpt_neox", "gpt2"]
HUNTED = [*DECODERS, *EXPERTS, *OTHERS]


def made(family: str, dropout: float | None) -> tuple[Any, dict[str, Tensor]]:
    """The family's model in train mode and a batch for it. dropout: of whatever the config calls so."""
    import transformers

    if family in FAMILIES or family in EXPERTS:
        model, kind = build(family), "text"
        config = copy.deepcopy(model.config)
        if dropout is not None:
            with_dropout(config, dropout)
            model, weights = type(model)(config), model.state_dict()
            model.load_state_dict(weights)
    else:
        config_class, model_class, own, kind = OTHERS[family]
        config = getattr(transformers, config_class)(**own)
        if dropout is not None:
            with_dropout(config, dropout)
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(config)
    for part in model.modules():  # T5's stacks have configs of their own
        if hasattr(part, "config"):
            part.config.use_cache = False
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 90, (2, 12), generator=g)
    inputs = {
        "text": {"input_ids": ids},
        "seq2seq": {"input_ids": ids, "decoder_input_ids": ids.flip(1)},
        "image": {"pixel_values": torch.randn(2, 3, 28, 28, generator=g)},
        "sound": {"input_values": torch.randn(2, 600, generator=g)},
        "mel": {"input_features": torch.randn(2, 16, 24, generator=g), "decoder_input_ids": ids},
    }[kind]
    return model.train(), inputs


def with_dropout(config: Any, p: float) -> None:
    """Every setting of a config that is a number and has "drop" in its name; whole layers are not dropped.

    DiffLlama refuses dropout in its attention, which is all that it has a setting for.
    """
    if config.model_type == "diffllama":
        return
    for name, value in list(vars(config).items()):
        if (
            "drop" in name
            and "layerdrop" not in name
            and isinstance(value, int | float)
            and not isinstance(value, bool)
        ):
            setattr(config, name, p)


def scalar(model: nn.Module, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    """A loss that every value of the model's first output takes part in."""
    output = model(**inputs, **more)
    out = output[0] if isinstance(output, tuple) else output.to_tuple()[0]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
    return (out * weights).sum() / out.shape[1] ** 0.5


def of_trained(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def one_step(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(3)
    scalar(model.train(), inputs).backward()
    return of_trained(model)


def with_two_adapters(model: nn.Module, family: str) -> Any:
    """Two adapters of one kind, which changes from family to family; three of the kinds draw random numbers.

    PEFT has no more than LoRA for GPT-2's Conv1D, and for fused experts none with a dropout.
    """
    import peft

    kinds: list[Callable[[], Any]] = [
        lambda: peft.LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear", init_lora_weights=False),
        lambda: peft.LoKrConfig(r=4, rank_dropout=0.3, target_modules="all-linear", init_weights=False),
        lambda: peft.LoHaConfig(r=4, rank_dropout=0.3, target_modules="all-linear", init_weights=False),
        lambda: peft.LoraConfig(r=4, use_dora=True, target_modules="all-linear", init_lora_weights=False),
    ]
    config = kinds[0 if family == "gpt2" else HUNTED.index(family) % len(kinds)]
    if "moe" in family:
        config = partial(peft.LoraConfig, r=4, lora_dropout=0.2, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(5)
    adapted = peft.get_peft_model(model, config())
    adapted.add_adapter("other", config())
    return adapted.train()


def two_adapters(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """One backward through a forward with each adapter."""
    torch.manual_seed(3)
    losses = []
    for name in ("default", "other"):
        model.set_adapter(name)
        losses.append(scalar(model, inputs))
    for name, p in model.named_parameters():
        p.requires_grad_(any(part in name for part in ("lora_", "lokr_", "hada_")))
    sum(losses).backward()  # type: ignore[union-attr]
    return of_trained(model)


def lent_weights(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of weights that are not the model's own."""
    g = torch.Generator().manual_seed(6)
    lent = {
        n: (p.detach() * (1 + 0.3 * torch.randn(p.shape, generator=g))).requires_grad_()
        for n, p in model.named_parameters()
    }
    torch.manual_seed(3)
    found = torch.autograd.grad(Called(model, lent)(inputs), list(lent.values()), allow_unused=True)
    return {n: grad for n, grad in zip(lent, found, strict=True) if grad is not None}


class Called:
    def __init__(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        self.model, self.weights = model, weights

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        return scalar(self.lent, inputs)  # type: ignore[arg-type]

    def lent(self, **inputs: Tensor) -> Any:
        return functional_call(self.model, self.weights, (), inputs)


def share_layers(model: nn.Module) -> None:
    """One layer at every place of the stack."""
    _, stack, _ = find_stack(model)
    for index in range(1, len(stack)):
        stack[index] = stack[0]
