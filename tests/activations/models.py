"""Models of many families, built from their configs: small, of true structure, with no weights downloaded."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}

# family: (config class, model class, changes to SMALL). `None` takes a key out.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    # Qwen2.5 is Qwen2's architecture, with tied weights in its small sizes.
    "qwen2.5": ("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 8}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {"sliding_window": 8, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"sliding_window": 8, "query_pre_attn_scalar": 16}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"head_dim": None}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {"head_dim": None}),
    "smollm": ("LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {"no_rope_layer_interval": 2, "head_dim": None}),
    "granite": (
        "GraniteConfig",
        "GraniteForCausalLM",
        {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1, "logits_scaling": 8.0},
    ),
    "glm": ("GlmConfig", "GlmForCausalLM", {}),
    "glm4": ("Glm4Config", "Glm4ForCausalLM", {}),
    "cohere": ("CohereConfig", "CohereForCausalLM", {"head_dim": None}),
    "cohere2": ("Cohere2Config", "Cohere2ForCausalLM", {"sliding_window": 8}),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", {"head_dim": None}),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", {"head_dim": None}),
    "exaone4": ("Exaone4Config", "Exaone4ForCausalLM", {"sliding_window": 8}),
    "olmo": ("OlmoConfig", "OlmoForCausalLM", {"head_dim": None}),
    "nemotron": ("NemotronConfig", "NemotronForCausalLM", {}),
    "apertus": ("ApertusConfig", "ApertusForCausalLM", {"head_dim": None}),
    "ernie4_5": ("Ernie4_5Config", "Ernie4_5ForCausalLM", {}),
    "seed_oss": ("SeedOssConfig", "SeedOssForCausalLM", {"attention_dropout": 0.0, "residual_dropout": 0.0}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {"head_dim": None, "num_key_value_heads": None}),
    "phi": ("PhiConfig", "PhiForCausalLM", {"head_dim": None}),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 96, "attn_pdrop": 0.0},
    ),
}

EXPERTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "decoder_sparse_step": 1},
    ),
}


def build(family: str, dtype: torch.dtype = torch.float32, attn: str = "sdpa", seed: int = 0, **changes: Any) -> Any:
    """A model of the family in train mode, its norms' weights moved off their starting values."""
    import transformers

    config_name, model_name, own = (FAMILIES | EXPERTS)[family]
    sizes = {"pad_token_id": 0} if family == "gpt2" else SMALL
    # Gemma 2 caps its attention scores, which sdpa cannot.
    attn = "eager" if family == "gemma2" else attn
    config = {k: v for k, v in (sizes | own | changes).items() if v is not None}
    torch.manual_seed(seed)
    made = getattr(transformers, config_name)(**config, attn_implementation=attn)
    model: Any = getattr(transformers, model_name)(made)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.to(dtype).train()


def batch(tokens: int = 24, rows: int = 2, vocab: int = 96) -> dict[str, Tensor]:
    ids = torch.randint(3, vocab, (rows, tokens), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "labels": ids.clone()}


def loss_and_gradients(model: nn.Module, inputs: dict[str, Any], seed: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    """One forward and backward pass from a given state of the random generator."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def twin(model: nn.Module, change: Callable[[Any], Any]) -> Any:
    """A copy of the model, changed."""
    copied = copy.deepcopy(model)
    change(copied)
    return copied
