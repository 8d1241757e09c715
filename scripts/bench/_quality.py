"""One run of the quality part: a Llama of 0.87 million parameters, made from its config, on Shakespeare's bytes.

Everything but the setting is held still. A seed decides the model's first weights and the order of the data, so the
runs of one seed differ in nothing but the setting, and a codec is judged by the difference to the same method's fp32
state at the same seed: that difference varies far less than the loss does from seed to seed.

Held-out loss is the mean over fixed windows of whole plays that no run trains on.

**bf16 weights** are computed with in fp32: every weight is read as bf16 and widened before the forward pass. bf16
matrix products are slow on a CPU and would add a rounding of their own, equal in all four ways. The ways differ in what
the optimizer keeps: "masters" steps fp32 weights, which the forward pass sees rounded to bf16; "keep", "bf16_sr" and
"bf16_ecc" have bf16 parameters and that `weights=` of `make_optimizer`. Gradients are rounded to bf16 in all four.
"""

import functools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _settings import Setting
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowmem.demo import data
from hf_lowmem.memory import optimizer_bytes
from hf_lowmem.optim import LowMemOptimizer, make_optimizer

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
LONG = SIZE | {"plays": 33, "steps": 5000}
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


def configuration(setting: Setting, *, rate: float, seed: int, size: dict[str, Any]) -> dict[str, Any]:
    """All that decides a run's result, in plain values; its JSON is the key under which the run is recorded."""
    return {
        "method": setting.method,
        "state": setting.state,
        "options": setting.options,
        "weights": setting.weights,
        "control": setting.control,
        "lr": float(f"{rate:.6g}"),
        "seed": seed,
        "size": size,
    }


def key(config: dict[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)


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


def build_optimizer(setting: Setting, model: nn.Module, *, rate: float, seed: int, decay: float) -> LowMemOptimizer:
    weights = setting.weights if setting.weights not in ("fp32", "masters") else "keep"
    return make_optimizer(
        setting.method,
        model,
        lr=rate,
        weight_decay=decay,
        state=setting.state,
        weights=weights,
        seed=seed,
        **setting.options,
    )


def unavailable(setting: Setting, size: dict[str, Any]) -> str | None:
    """Why `setting` cannot be built here; None when it can."""
    model = build_model(size, 0, bf16=setting.weights not in ("fp32", "masters"))
    try:
        build_optimizer(setting, model, rate=1e-3, seed=0, decay=0.0)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def forward_of(model: nn.Module, weights: str) -> Callable[[Tensor], Tensor]:
    """ids → mean next-byte loss, the weights seen as the store `weights` says."""
    if weights == "fp32":
        return lambda ids: model(input_ids=ids, labels=ids).loss

    def forward(ids: Tensor) -> Tensor:
        seen = {name: p.to(torch.bfloat16).to(torch.float32) for name, p in model.named_parameters()}
        return functional_call(model, seen, kwargs={"input_ids": ids, "labels": ids}).loss

    return forward


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


def run(setting: Setting, *, rate: float, seed: int, size: dict[str, Any]) -> dict[str, Any]:
    """Train once; the row of the record. A loss that is not finite is recorded as None."""
    began, used = time.perf_counter(), time.process_time()
    bf16 = setting.weights != "fp32"
    model = build_model(size, seed, bf16=bf16 and setting.weights != "masters", control=setting.control)
    parameters = list(model.parameters())
    optimizer = build_optimizer(setting, model, rate=rate, seed=seed, decay=size["weight_decay"])
    forward = forward_of(model, setting.weights)
    peaks = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for step, ids in enumerate(batches(size, seed)):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rate_at(step, size)
        loss = forward(ids)
        loss.backward()
        clip_(parameters, size["clip"], bf16=bf16)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    heldout = heldout_loss(forward, size)
    count = sum(p.numel() for p in parameters)
    train = statistics.fmean(losses[-max(1, size["steps"] // 4) :])
    return configuration(setting, rate=rate, seed=seed, size=size) | {
        "setting": setting.name,
        "codecs": sorted({group["state"] for group in optimizer.param_groups}),  # what "8bit" stood for
        "parameters": count,
        "state_bytes_per_parameter": optimizer_bytes(optimizer) / count,
        "weight_bytes_per_parameter": sum(p.nbytes for p in parameters) / count,
        "train_loss": train if math.isfinite(train) else None,
        "heldout_loss": heldout if math.isfinite(heldout) else None,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - used,
    }
