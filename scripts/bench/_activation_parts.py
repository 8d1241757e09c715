"""The parts of activations.py that measure. Each yields rows of the record.

A unit U is tokens × hidden × 2 bytes: one bf16 tensor of the residual stream.
"""

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import _quality
import torch
from torch import nn
from torch._functorch import config as functorch_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from hf_lowmem.activations import convert, undo
from hf_lowmem.kernels import spans
from hf_lowmem.memory import measure_saved
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
BUDGETS = (1.0, 0.5, 0.25)  # of torch.compile's partitioner: 1 keeps all that recomputing would cost anything


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


@contextmanager
def budget_of(way: str) -> Iterator[None]:
    """The memory budget of torch.compile's partitioner while "compile 0.5" and the like are measured."""
    before = functorch_config.activation_memory_budget
    functorch_config.activation_memory_budget = float(way.split()[1]) if way.startswith("compile") else before
    try:
        yield
    finally:
        functorch_config.activation_memory_budget = before
        torch._dynamo.reset()


def kept_by(way: str, family: str, shape: dict[str, Any], hidden: int, tokens: int, *, adapters: bool) -> float:
    """Bytes that one layer keeps: the difference between a model of three layers and one of two."""
    found = []
    for layers in (2, 3):
        model = build(family, shape, layers=layers, hidden=hidden, tokens=tokens, dtype=torch.bfloat16)
        model = prepared(way, lora(model) if adapters else model)
        ids = torch.randint(3, 256, (2, tokens // 2), generator=torch.Generator().manual_seed(0))
        with budget_of(way), measure_saved(model) as saved:
            output = model(input_ids=ids)
            found.append(saved.total)
            del output
    return found[1] - found[0]


def bytes_rows(smoke: bool, old: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    hidden, tokens = (64, 64) if smoke else (HIDDEN, TOKENS)
    names = ["Llama-3-8B"] if smoke else [*SHAPES]
    for name in names:
        family, shape = SHAPES[name]
        compiled = [f"compile {b}" for b in BUDGETS] if name.startswith("Llama") and not smoke else []
        for way in ("HuggingFace", "checkpointing", *compiled, *TIERS):
            size = kept_by(way, family, shape, hidden, tokens, adapters=False)
            yield {"case": name, "way": way, "units": size / (hidden * tokens * 2)}
    for way in ("HuggingFace", *TIERS):
        size = kept_by(way, *SHAPES["Llama-2-7B"], hidden, tokens, adapters=True)
        yield {"case": "Llama-2-7B, LoRA", "way": way, "units": size / (hidden * tokens * 2)}
    yield {"case": "Llama-3-8B", "way": "TRL activation_offloading", "units": None, "why": "needs a CUDA device"}


def gradients(model: nn.Module, ids: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def error_rows(smoke: bool, old: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Relative error of each parameter's gradient against float64, as a norm, on text: worst and median parameter."""
    size = SMOKE_5M if smoke else SIZE_5M
    plain = _quality.build_model(size, 0, bf16=False)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    steps = 2 if smoke else 60  # gradients of trained weights, not of first ones
    draws = list(_quality.batches(size | {"steps": steps + 1}, 0))
    for ids in draws[:-1]:
        plain(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ids = draws[-1]
    truth_loss, truth = gradients(copy.deepcopy(plain).double(), ids)
    losses = {}
    for way in ("HuggingFace", *TIERS):
        model = prepared(way, copy.deepcopy(plain))
        losses[way], ours = gradients(model, ids)
        errors = {n: ((ours[n] - g).norm() / g.norm()).item() for n, g in truth.items()}
        worst = max(errors, key=lambda n: errors[n])
        whole = torch.cat([(ours[n] - g).flatten() for n, g in truth.items()]).norm()
        yield {
            "case": "Llama 5M, trained 60 steps",
            "way": way,
            "worst": errors[worst],
            "worst_parameter": worst,
            "median": statistics.median(errors.values()),
            "whole": (whole / torch.cat([g.flatten() for g in truth.values()]).norm()).item(),
            "loss_equal_to_huggingface": losses[way] == losses["HuggingFace"],
            "loss_float64": truth_loss,
        }


def time_rows(smoke: bool, old: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Forward and backward of a whole model, as ratios to HuggingFace's; interleaved, medians."""
    hidden, tokens, repeats = (64, 64, 2) if smoke else (HIDDEN, TOKENS, 9)
    family, shape = SHAPES["Llama-3-8B"]
    ids = torch.randint(3, 256, (2, tokens // 2), generator=torch.Generator().manual_seed(0))
    model = build(family, shape, layers=4, hidden=hidden, tokens=tokens, dtype=torch.float32)
    ways = ("HuggingFace", "checkpointing", *TIERS)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(repeats + 1):
        for way in ways:
            prepared(way, model)
            began = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            if repeat:  # the first warms up
                seconds[way].append(time.perf_counter() - began)
            model.zero_grad()
            undo(model)
            model.gradient_checkpointing_disable()
    base = statistics.median(seconds["HuggingFace"])
    for way in ways:
        ratios = [a / b for a, b in zip(seconds[way], seconds["HuggingFace"], strict=True)]
        yield {
            "case": "Llama-3-8B shape, hidden 512, 4 layers, fp32, forward and backward",
            "way": way,
            "ratio": statistics.median(seconds[way]) / base,
            "ratio_of_pairs": statistics.median(ratios),
            "repeats": repeats,
        }


PEAK_TOKENS = (2048, 16384)


def peak_rows(smoke: bool, old: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A step of a bf16 Llama-3-8B under FakeTensorMode: nothing is allocated, every tensor is counted."""
    layers, lengths = (2, (64,)) if smoke else (32, PEAK_TOKENS)
    spans.CPU_SPAN_PER_THREAD = spans.ACCELERATOR_SPAN  # fake CPU tensors stand for a device's
    for tokens in lengths:
        for way in ("HuggingFace", "checkpointing", *TIERS):
            for freed in (False, True):
                yield peak_row(way, layers, tokens, smoke, freed)


def peak_row(way: str, layers: int, tokens: int, smoke: bool, freed: bool) -> dict[str, Any]:
    began = time.perf_counter()
    peak, at_end = weigh(way, layers, tokens, smoke, freed)
    return {
        "case": f"{tokens:,} tokens, gradients {'freed in backward' if freed else 'kept'}",
        "way": way,
        "layers": layers,
        "tokens": tokens,
        "peak": peak["Total"],
        "parts": {k: v for k, v in peak.items() if k != "Total" and v},
        "kept_at_the_end_of_forward": at_end,
        "seconds_to_weigh": time.perf_counter() - began,
    }


def weigh(way: str, layers: int, tokens: int, smoke: bool, freed: bool) -> tuple[dict[str, int], int]:
    """(peak by kind, bytes beside weights when forward ends) of a step: weights, gradients and activations.

    The loss is the sum of the last hidden states: no logits, as with a fused head. No optimizer: its state is a
    constant that scripts/bench/optimizers.py measures.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    width = 64 if smoke else 4096
    settings: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": width * 7 // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 128 or 1,
        "num_key_value_heads": max(width // 512, 1),
        "vocab_size": 128256,
        "max_position_embeddings": tokens,
        "attn_implementation": "sdpa",
        "use_cache": False,
    }
    config = LlamaConfig(**settings)
    tracker = MemTracker()
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = prepared(way, LlamaForCausalLM(config).train())
            for p in model.parameters():
                if freed:  # as lowmem_step_in_backward does
                    p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            tracker.track_external(model)
            ids = torch.zeros(1, tokens, dtype=torch.long)
            with tracker:
                hidden = model.model(input_ids=ids).last_hidden_state
                ends = total(tracker.get_tracker_snapshot("current"))
                hidden.sum().backward()
        finally:
            torch.set_default_dtype(torch.float32)
    peak = total(tracker.get_tracker_snapshot("peak"))
    return peak, ends["Total"] - ends["PARAM"] - ends.get("BUFFER", 0)


def total(snapshot: dict[torch.device, dict[Any, int]]) -> dict[str, int]:
    """Bytes by kind over all devices."""
    found: dict[str, int] = {}
    for kinds in snapshot.values():
        for kind, size in kinds.items():
            name = str(getattr(kind, "name", kind))
            found[name] = found.get(name, 0) + size
    return found


SIZE_5M = _quality.SIZE | {
    "hidden": 256,
    "intermediate": 704,
    "layers": 5,
    "vocabulary": 2048,
    "steps": 200,
    "batch": 4,
    "tokens": 128,
    "heldout_windows": 256,
}
SMOKE_5M = _quality.SMOKE
RATE = 3e-3
SEEDS = (0, 1, 2)


def loss_rows(smoke: bool, old: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Train a Llama of five million parameters with AdamW, from the same weights on the same text."""
    size = SMOKE_5M if smoke else SIZE_5M
    done = {(row["way"], row["seed"]) for row in old if row["size"] == size}
    for seed in SEEDS[:1] if smoke else SEEDS:
        for way in ("HuggingFace", *TIERS):
            if (way, seed) not in done:
                yield loss_row(way, seed, size)


def loss_row(way: str, seed: int, size: dict[str, Any]) -> dict[str, Any]:
    model = prepared(way, _quality.build_model(size, seed, bf16=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=size["weight_decay"], fused=True)
    forward: Callable[[torch.Tensor], torch.Tensor] = lambda ids: model(input_ids=ids, labels=ids).loss  # noqa: E731
    losses = []
    began = time.perf_counter()
    for step, ids in enumerate(_quality.batches(size, seed)):
        optimizer.param_groups[0]["lr"] = RATE * _quality.rate_at(step, size)
        loss = forward(ids)
        loss.backward()
        _quality.clip_(list(model.parameters()), size["clip"], bf16=False)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {
        "case": "Llama 5M on Shakespeare, 200 steps",
        "way": way,
        "seed": seed,
        "size": size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_loss": statistics.fmean(losses[-max(1, size["steps"] // 4) :]),
        "heldout_loss": _quality.heldout_loss(forward, size),
        "seconds": time.perf_counter() - began,
    }
