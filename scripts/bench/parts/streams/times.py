"""A streamed step beside HuggingFace's checkpointing step: process time, one after the other in one process."""

import copy
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowmem.activations import convert
from parts.record import Row, Rows

MODEL: Row = {
    "hidden_size": 128,
    "intermediate_size": 448,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 512,
}
TIERS = ("stream", "stream_fp8")


def rows(tokens: int, repeats: int, tiers: tuple[str, ...] = TIERS, shape: Row = MODEL) -> Rows:
    """A row a tier: seconds of forward and backward pass, and the median ratio to checkpointing's beside it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(**shape, max_position_embeddings=tokens)
    plain = LlamaForCausalLM(config).train()
    ways = {"HF checkpointing": copy.deepcopy(plain)}
    ways["HF checkpointing"].gradient_checkpointing_enable({"use_reentrant": False})
    for tier in tiers:
        ways[tier] = copy.deepcopy(plain)
        convert(ways[tier], tier)
    ids = torch.randint(shape["vocab_size"], (1, tokens))
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    losses: dict[str, float] = {}
    for turn in range(repeats + 1):
        # The first turn loads code and tries layers, for which a few tokens do.
        given = ids if turn else ids[:, : tokens // 16]
        for way, model in ways.items():
            model.zero_grad(set_to_none=True)
            before = time.process_time()
            loss = model(input_ids=given, labels=given, use_cache=False).loss
            loss.backward()
            if turn:
                seconds[way].append(time.process_time() - before)
            losses[way] = float(loss.detach())
    first = seconds["HF checkpointing"]
    return [
        {
            "setting": way,
            "tokens": tokens,
            "model": shape,
            "seconds": [round(s, 2) for s in found],
            "ratio": round(statistics.median(ours / theirs for ours, theirs in zip(found, first, strict=True)), 3),
            "loss": losses[way],
        }
        for way, found in seconds.items()
    ]
