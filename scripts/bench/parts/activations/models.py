"""Small models of known shapes, and the ways of keeping what their backward pass needs."""

from typing import Any

import torch

from hf_lowmem.activations import convert
from hf_lowmem.specs import TIERS

HIDDEN, TOKENS = 512, 512
# Shapes of published models at an eighth (7B, 8B) of their width; head size 64.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-2-7B": ("Llama", {"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 1376}),
    "Llama-3-8B": ("Llama", {"num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 1792}),
    "Mistral-7B": ("Mistral", {"num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 1792}),
    "Qwen2.5-7B": ("Qwen2", {"num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 2706}),
    "Qwen3-8B": ("Qwen3", {"num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 1536}),
    "Phi-3-mini": ("Phi3", {"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 1365}),
    "OLMo-2-7B": ("Olmo2", {"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 1376}),
    "Gemma-3-4B": ("Gemma3", {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 2048}),
}


def build(family: str, shape: dict[str, Any], *, layers: int, hidden: int, tokens: int, dtype: torch.dtype) -> Any:
    """A model made from its config, with random weights, in train mode."""
    import transformers

    text = "Text" if family == "Gemma3" else ""
    heads = shape["num_attention_heads"]
    config = getattr(transformers, f"{family}{text}Config")(
        hidden_size=hidden,
        num_hidden_layers=layers,
        head_dim=hidden // heads,
        vocab_size=256,
        max_position_embeddings=tokens,
        pad_token_id=0,
        attn_implementation="sdpa",
        use_cache=False,
        **shape,
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).train()


def lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=8, lora_dropout=0.05, target_modules="all-linear"))


def prepared(way: str, model: Any) -> Any:
    """`model`, made to keep what `way` keeps."""
    if way in TIERS:
        convert(model, way)
    elif way == "checkpointing":
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    elif way.startswith("compile"):
        for layer in model.model.layers:
            layer.compile(backend="aot_eager_decomp_partition")
    return model
