"""A Llama of 0.87 million parameters, made from its config, on Shakespeare's plays: what is trained, and on what.

A seed decides the model's first weights and the order of the data. Held-out loss is the mean over fixed windows of
whole plays that no run trains on.
"""

import functools
import math
import os
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowmem.demo import data

SIZE: dict[str, Any] = {
    "plays": 12,
    "heldout_plays": 4,
    "vocabulary": 1024,
    "hidden": 128,
    "intermediate": 352,
    "layers": 4,
    "heads": 4,
    "steps": 250,
    "batch": 8,
    "tokens": 96,
    "heldout_windows": 384,
    "init": 0.08,  # 1/sqrt(hidden); HuggingFace's 0.02 is a large model's
    "warmup": 0.1,
    "weight_decay": 0.1,
    "clip": 1.0,
}
SMOKE = SIZE | {
    "plays": 1,
    "heldout_plays": 1,
    "vocabulary": 300,
    "hidden": 64,
    "intermediate": 96,
    "layers": 1,
    "steps": 3,
    "batch": 2,
    "heldout_windows": 4,
}
CONTROL_NOISE = 2.0**-20  # relative, of the first weights


@functools.cache
def texts(plays: int, heldout_plays: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """(train, held-out) plays as token ids end to end; the tokenizer is a byte-level BPE made from the training plays.

    Tokens rather than bytes, which would make a run's loss a matter of luck: a model of bytes spends 250 steps on a
    plateau and its end, and whether a run leaves it a few steps sooner or later weighs more than any codec.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    train, heldout = data.split_plays(data.load_plays(), held_out=heldout_plays, seed=0)
    tokenizer = ByteLevelBPETokenizer()
    read = [s.text + "\n\n" for play in sorted(train)[:plays] for s in train[play]]
    tokenizer.train_from_iterator(read, vocab_size=vocabulary, show_progress=False)

    def joined(speeches: list[str]) -> Tensor:
        return torch.tensor([i for encoded in tokenizer.encode_batch(speeches) for i in encoded.ids])

    return joined(read), joined([s.text + "\n\n" for speeches in heldout.values() for s in speeches])


def texts_of(size: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return texts(size["plays"], size["heldout_plays"], size["vocabulary"])


def batches(size: dict[str, Any], seed: int) -> Iterator[Tensor]:
    """(batch, tokens), drawn anywhere in the training text."""
    train, _ = texts_of(size)
    draw = torch.Generator().manual_seed(seed)
    within = torch.arange(size["tokens"])
    for _ in range(size["steps"]):
        starts = torch.randint(len(train) - size["tokens"], (size["batch"], 1), generator=draw)
        yield train[starts + within]


def build_model(size: dict[str, Any], seed: int, *, bf16: bool, control: bool = False) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=size["vocabulary"],
        hidden_size=size["hidden"],
        intermediate_size=size["intermediate"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        max_position_embeddings=size["tokens"],
        initializer_range=size["init"],
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    for p in model.parameters():
        if control:
            p.data.mul_(1 + CONTROL_NOISE * torch.randn_like(p))
        if bf16:  # parameters only: a bf16 table of rotary frequencies would be another model
            p.data = p.data.to(torch.bfloat16)
    return model


def clip_(parameters: list[nn.Parameter], largest: float, *, bf16: bool) -> None:
    """Scale all gradients so that their joint norm is at most `largest`; with `bf16` round them to it.

    Not torch's function: it would take the norm of bf16 gradients in bf16, and "masters" would train on others.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.stack([g.float().norm() for g in gradients]).norm()
    factor = (largest / (norm + 1e-6)).clamp(max=1.0)
    for g in gradients:
        scaled = g.float() * factor
        g.copy_(scaled.to(torch.bfloat16) if bf16 else scaled)


def rate_at(step: int, size: dict[str, Any]) -> float:
    """Share of the learning rate at `step` (from 0): linear warm-up, then a cosine to zero."""
    warm = max(1, round(size["warmup"] * size["steps"]))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, size["steps"] - warm)))


@torch.no_grad()
def heldout_loss(forward: Callable[[Tensor], Tensor], size: dict[str, Any]) -> float:
    """Mean over windows spread evenly over the held-out text."""
    _, text = texts_of(size)
    starts = torch.linspace(0, len(text) - size["tokens"], size["heldout_windows"]).long()
    windows = text[starts[:, None] + torch.arange(size["tokens"])]
    return statistics.fmean(forward(some).item() for some in windows.split(16))  # windows: a multiple of 16, or fewer
