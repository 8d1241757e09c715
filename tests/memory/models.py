"""Two small models that the tests of this folder count, and a step of each."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from tests.conftest import tiny_llama

VOCAB, HIDDEN, HEADS, LAYERS, BATCH, TOKENS = 64, 32, 4, 3, 2, 16


def llama(**changes) -> LlamaForCausalLM:
    sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "max_position_embeddings": TOKENS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "num_hidden_layers": LAYERS}
    return tiny_llama(**sizes, **heads, use_cache=False, **changes).train()


def llama_step(model: nn.Module) -> Callable[[], Tensor]:
    def step() -> Tensor:
        ids = (torch.arange(BATCH * TOKENS) % VOCAB).view(BATCH, TOKENS)
        return model(input_ids=ids, labels=ids.clone()).loss

    return step


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Dropout(0.5), nn.Linear(16, 4))


def mlp_step(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: model(torch.linspace(-1, 1, 24).view(3, 8).clone()).square().sum()
