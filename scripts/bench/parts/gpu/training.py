"""Part training: a Llama-3-8B's layer and the whole model, forward and backward (and step): tokens/s and peak.

Random weights from a config, random tokens. The head is TRL's fused one where trl is installed, so that no logits are
built, else HuggingFace's; every row says which, and one run has one head for all rows. `ways` at a reduced depth are
compared with HuggingFace eager in the same run; at full depth only what fits is expected to finish, and what does not
says so.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch

from hf_lowmem.activations import convert
from hf_lowmem.optim import StepInBackward, make_optimizer
from hf_lowmem.specs import TIERS
from parts.gpu.timing import free, peak_bytes, seconds_of
from parts.record import Row
from parts.shapes import LLAMA_8B, TOY_SHAPE

WAYS = ("HuggingFace", "HuggingFace + Liger", "checkpointing", "torch.compile", *TIERS)
LAYER_WAYS = ("HuggingFace", "torch.compile", *TIERS)

# Whole training: what stands beside weights in bf16, from the usual to the least.
WHOLE: dict[str, dict[str, Any]] = {
    "torch AdamW fused, checkpointing": {"way": "checkpointing"},
    "bitsandbytes AdamW8bit, checkpointing": {"way": "checkpointing", "bitsandbytes": True},
    "adamw 8bit bf16_sr, exact": {"way": "exact", "ours": {"name": "adamw", "state": "8bit", "weights": "bf16_sr"}},
    "adamw 8bit bf16_sr, fp8, step in backward": {
        "way": "fp8",
        "ours": {"name": "adamw", "state": "8bit", "weights": "bf16_sr"},
        "in_backward": True,
    },
    "apollo_mini 8bit bf16_sr, fp8, step in backward": {
        "way": "fp8",
        "ours": {"name": "apollo_mini", "state": "8bit", "weights": "bf16_sr"},
        "in_backward": True,
    },
    "apollo_mini 8bit bf16_sr, checkpoint_fp8, step in backward": {
        "way": "checkpoint_fp8",
        "ours": {"name": "apollo_mini", "state": "8bit", "weights": "bf16_sr"},
        "in_backward": True,
    },
}


def head() -> str:
    return "fused (trl)" if find_spec("trl") else "logits"


def build(shape: dict[str, Any], layers: int, tokens: int, device: torch.device) -> Any:
    """A bf16 Llama with random weights, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = shape | {
        "num_hidden_layers": layers,
        "max_position_embeddings": max(tokens, 128),
        "use_cache": False,
        "attn_implementation": "sdpa",
        "pad_token_id": 0,
    }
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.manual_seed(0)
        with device:
            model = LlamaForCausalLM(LlamaConfig(**settings))
    finally:
        torch.set_default_dtype(before)
    return model.train()


def prepare(way: str, model: Any) -> Any:
    if way in TIERS:
        convert(model, way)
    elif way == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    elif way == "torch.compile":
        for layer in model.model.layers:
            layer.compile()
    elif way == "HuggingFace + Liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama  # pyright: ignore[reportMissingImports]

        apply_liger_kernel_to_llama(cross_entropy=False, fused_linear_cross_entropy=False, model=model)
    return model


def with_head(model: Any) -> Any:
    """A function from token ids to the loss."""
    if head() == "logits":
        return lambda ids: model(input_ids=ids, labels=ids).loss
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model)
    return lambda ids: -model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.mean()


def ids_of(model: Any, tokens: int, device: torch.device) -> torch.Tensor:
    draw = torch.Generator(device).manual_seed(1)
    return torch.randint(1, model.config.vocab_size, (1, tokens), device=device, generator=draw)


def reduced(way: str, shape: dict[str, Any], layers: int, tokens: int, device: torch.device) -> Row:
    """Forward and backward of a few layers and the head; the gradients are kept."""
    free(device)
    model = prepare(way, build(shape, layers, tokens, device))
    loss, ids = with_head(model), ids_of(model, tokens, device)

    def call() -> None:
        loss(ids).backward()

    seconds = seconds_of(call, device, repeats=5)
    return {"seconds": seconds, "tokens_per_second": tokens / seconds, "peak": peak_bytes(device)}


def layer(way: str, shape: dict[str, Any], tokens: int, device: torch.device) -> Row:
    """One decoder layer alone."""
    free(device)
    model = prepare(way, build(shape | {"vocab_size": 256}, 1, tokens, device))
    hidden = torch.randn(1, tokens, shape["hidden_size"], device=device, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(hidden)

    def call() -> None:
        model.model(inputs_embeds=hidden).last_hidden_state.backward(grad)

    call()
    free(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    output = model.model(inputs_embeds=hidden).last_hidden_state
    kept = torch.cuda.memory_allocated(device) - before if device.type == "cuda" else None
    del output
    seconds = seconds_of(call, device, repeats=10)
    return {"seconds": seconds, "tokens_per_second": tokens / seconds, "kept_bytes": kept}


def whole(
    spec: dict[str, Any], shape: dict[str, Any], layers: int, tokens: int, device: torch.device
) -> dict[str, Any]:
    """Training steps of the whole model: forward, backward, optimizer."""
    free(device)
    model = prepare(spec["way"], build(shape, layers, tokens, device))
    loss, ids = with_head(model), ids_of(model, tokens, device)
    optimizer: Any
    if "ours" in spec:
        optimizer = make_optimizer(model=model, lr=1e-5, **spec["ours"])
    elif "bitsandbytes" in spec:
        from bitsandbytes.optim import AdamW8bit

        optimizer = AdamW8bit(model.parameters(), lr=1e-5)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    stepping = StepInBackward(optimizer) if spec.get("in_backward") else None
    losses = []

    def call() -> None:
        value = loss(ids)
        value.backward()
        if stepping is None:
            optimizer.step()
        optimizer.zero_grad()
        losses.append(value.detach())

    seconds = seconds_of(call, device, repeats=3)
    found = [value.item() for value in losses]
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak": peak_bytes(device),
        "first_loss": found[0],
        "last_loss": found[-1],
        "wrong": not all(torch.isfinite(torch.tensor(found))),
    }


def rows(device: torch.device, toy: bool, in_time: Any) -> Iterator[Row]:
    from transformers.models.llama import modeling_llama

    shape = TOY_SHAPE if toy else LLAMA_8B
    tokens = 32 if toy else 2048
    some, all_layers = (2, 2) if toy else (8, 32)
    common = {"head": head(), "tokens": tokens}
    cases: list[tuple[str, str, Any]] = [
        ("layer", way, lambda w=way: layer(w, shape, tokens, device)) for way in LAYER_WAYS
    ]
    cases += [(f"{some} layers", way, lambda w=way: reduced(w, shape, some, tokens, device)) for way in WAYS]
    cases += [
        (f"whole, {all_layers} layers", name, lambda s=spec: whole(s, shape, all_layers, tokens, device))
        for name, spec in WHOLE.items()
    ]
    base: dict[str, float] = {}
    before = dict(modeling_llama.__dict__)
    for case, way, measure in cases:
        row: Row = {"case": case, "way": way, **common}
        if not in_time():
            yield row | {"note": "left out: no time"}
            continue
        theirs = way in ("HuggingFace + Liger", "torch.compile") or "bitsandbytes" in way
        try:
            row |= measure()
        except Exception as error:  # what somebody else's package cannot do here is said; ours may only lack memory
            if not theirs and not isinstance(error, torch.OutOfMemoryError):
                raise
            yield row | {"note": f"{type(error).__name__}: {str(error)[:200]}"}
            continue
        finally:
            torch.compiler.reset()
            modeling_llama.__dict__.update(before)  # Liger puts classes of its own there
        base.setdefault(case, row["tokens_per_second"])
        yield row | {"speed_to_first_way": row["tokens_per_second"] / base[case]}
