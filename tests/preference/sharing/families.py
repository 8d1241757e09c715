"""Tiny random models of many families, batches for them, and what a batch's loss gives with and without sharing."""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

from hf_lowmem.preference.sharing import SharedPairs, share_prompts, without_sharing

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = 6  # shorter than most of the sequences below
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "router_aux_loss_coef": 0.0}
# family: (config, what differs from SIZES)
FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama, heads not grouped": (LlamaConfig, {"num_key_value_heads": 4}),
    "llama, tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "llama, eager": (LlamaConfig, {"attn_implementation": "eager"}),
    "qwen2": (Qwen2Config, {}),
    "qwen2, windows in half of its layers": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "qwen3, experts": (Qwen3MoeConfig, {"head_dim": 16} | MOE),
    "gemma": (GemmaConfig, {"head_dim": 16}),
    "gemma2, windows": (Gemma2Config, {"head_dim": 16, "sliding_window": WINDOW}),
    "gemma3, windows": (Gemma3TextConfig, {"head_dim": 16, "sliding_window": WINDOW, "num_hidden_layers": 6}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "mistral, windows": (MistralConfig, {"sliding_window": WINDOW}),
    "phi3": (Phi3Config, {"sliding_window": None}),
    "cohere2, windows": (Cohere2Config, {"sliding_window": WINDOW}),
    "gpt-neox": (GPTNeoXConfig, {}),
    "gpt2": (GPT2Config, {"n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "opt": (OPTConfig, {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0}),
    "falcon": (FalconConfig, {"alibi": False}),
}
# Lengths of prompt, chosen and rejected: ordinary, completions of one token, no prompt, a prompt of one token.
LENGTHS = [(12, 5, 3), (7, 1, 9), (9, 4, 1), (0, 4, 6), (1, 1, 1)]


def tiny(family: str, **overrides: Any) -> Any:
    """A model with TRL's fused head. Its weights are drawn wider than by default, so that attention is uneven."""
    config, sizes = FAMILIES[family]
    settings = SIZES | sizes | overrides
    attention = settings.pop("attn_implementation", None)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config(**settings), attn_implementation=attention)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.05)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    return model


def examples(lengths: list[tuple[int, int, int]] | None = None, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(3, 128, (count,), generator=generator).tolist()

    return [
        {"prompt_ids": ids(p), "chosen_ids": ids(c), "rejected_ids": ids(r)} for p, c, r in LENGTHS + (lengths or [])
    ]


def batch(budget: int | None = None, pairs: list[dict[str, Any]] | None = None, **collator: Any) -> dict[str, Any]:
    plain = DataCollatorForPreference(pad_token_id=0, **collator)
    return SharedPairs(plain, budget, collator.get("pad_to_multiple_of"))(examples() if pairs is None else pairs)


def outputs_of(model: Any, inputs: dict[str, Any]) -> Any:
    """The fused head's output, as DPOTrainer asks for it."""
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    inputs = {k: v for k, v in inputs.items() if k != "completion_mask"}
    return model(**inputs, labels=labels, fused_lm_head=True, use_cache=False)


def loss_of(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """DPO's own, without a reference."""
    chosen, rejected = outputs_of(model, inputs).log_probs.sum(dim=1).chunk(2)
    return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()


def gradients(model: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(model, inputs).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def both(family: str, inputs: dict[str, Any], **overrides: Any) -> tuple[Any, dict[str, Any]]:
    """A model that can do both, and the plain batch."""
    model = tiny(family, **overrides)
    share_prompts(model)
    return model, without_sharing(inputs)
