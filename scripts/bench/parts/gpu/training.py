"""Steps layers and whole: a Llama-3-8B at reduced and at full depth, forward and backward (and update): tokens/s, peak.

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
from parts.gpu.steps import Case
from parts.gpu.timing import device_and_host, free, peak_bytes, reserved_bytes
from parts.record import Row
from parts.shapes import LLAMA_8B, TOY_SHAPE

WAYS = ("HuggingFace", "fp8", "checkpointing", "exact", "checkpoint_fp8", "fp8_recompute", "hooks_fp8")
assert {"HuggingFace", "checkpointing", *TIERS} == set(WAYS)
THEIRS = ("HuggingFace + Liger", "torch.compile")

EIGHT_BIT = {"state": "8bit", "weights": "bf16_sr"}
# Whole training, the recommended setting first. fields: what a config says for the same, for who plans it.
WHOLE: dict[str, dict[str, Any]] = {
    "adamw 8bit bf16_sr, fp8, step in backward": {
        "way": "fp8",
        "ours": {"name": "adamw", **EIGHT_BIT},
        "in_backward": True,
        "fields": {"optim": "adamw", "lowmem_activations": "fp8", "lowmem_step_in_backward": True},
    },
    "torch AdamW fused, checkpointing": {
        "way": "checkpointing",
        "fields": {"optim": "adamw_torch_fused", "gradient_checkpointing": True},
    },
    "adamw 8bit bf16_sr, exact": {
        "way": "exact",
        "ours": {"name": "adamw", **EIGHT_BIT},
        "fields": {"optim": "adamw", "lowmem_activations": "exact"},
    },
    "apollo_mini 8bit bf16_sr, checkpoint_fp8, step in backward": {
        "way": "checkpoint_fp8",
        "ours": {"name": "apollo_mini", **EIGHT_BIT},
        "in_backward": True,
        "fields": {"optim": "apollo_mini", "lowmem_activations": "checkpoint_fp8", "lowmem_step_in_backward": True},
    },
    "bitsandbytes AdamW8bit, checkpointing": {
        "way": "checkpointing",
        "bitsandbytes": True,
        "fields": {"optim": "adamw_8bit", "gradient_checkpointing": True},
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


def ids_of(model: Any, rows: int, tokens: int, device: torch.device) -> torch.Tensor:
    draw = torch.Generator(device).manual_seed(1)
    return torch.randint(1, model.config.vocab_size, (rows, tokens), device=device, generator=draw)


def reduced(
    way: str, shape: dict[str, Any], layers: int, rows: int, tokens: int, device: torch.device, repeats: int
) -> Row:
    """Forward and backward of a few layers and the head: `rows` rows of `tokens` tokens."""
    model = prepare(way, build(shape, layers, tokens, device))
    loss, ids = with_head(model), ids_of(model, rows, tokens, device)

    def call() -> None:
        loss(ids).backward()
        model.zero_grad(set_to_none=True)

    call()
    free(device)
    seconds, host = device_and_host(call, device, repeats=repeats, warm_up=1)
    return {
        "seconds": seconds,
        "host_seconds": host,
        "tokens_per_second": rows * tokens / seconds,
        "peak": peak_bytes(device),
        "reserved": reserved_bytes(device),
    }


def whole(
    spec: dict[str, Any], shape: dict[str, Any], layers: int, tokens: int, device: torch.device, repeats: int
) -> dict[str, Any]:
    """Training steps of the whole model: forward, backward, optimizer."""
    model = prepare(spec["way"], build(shape, layers, tokens, device))
    if "multiply" in spec:
        spec["multiply"](model)
    loss, ids = with_head(model), ids_of(model, 1, tokens, device)
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

    call()  # states are made, kernels compiled
    free(device)
    seconds, host = device_and_host(call, device, repeats=repeats, warm_up=1)
    found = [value.item() for value in losses]
    return {
        "seconds": seconds,
        "host_seconds": host,
        "tokens_per_second": tokens / seconds,
        "peak": peak_bytes(device),
        "reserved": reserved_bytes(device),
        "first_loss": found[0],
        "last_loss": found[-1],
        "wrong": not all(torch.isfinite(torch.tensor(found))),
    }


def cases(device: torch.device, toy: bool, theirs: bool = False) -> Iterator[Case]:
    """Layers and head at reduced depth: all ways on four rows of 2,048 tokens, the first two on one row."""
    shape, layers, tokens, repeats = (TOY_SHAPE, 2, 32, 1) if toy else (LLAMA_8B, 8, 2048, 4)
    shown = [(way, 4) for way in (THEIRS if theirs else WAYS)] + ([] if theirs else [(way, 1) for way in WAYS[:2]])
    for way, rows in shown:
        what = {"case": f"{layers} layers, {rows} x {tokens} tokens", "way": way, "head": head()}
        yield Case(what, lambda w=way, r=rows: _alone(w, shape, layers, r, tokens, device, repeats), theirs=theirs)


def _alone(*arguments: Any) -> Row:
    """A reduced model, after which HuggingFace's classes are its own again: Liger puts others in their place."""
    from transformers.models.llama import modeling_llama

    before = dict(modeling_llama.__dict__)
    try:
        return reduced(*arguments)
    finally:
        torch.compiler.reset()
        modeling_llama.__dict__.update(before)


def whole_cases(device: torch.device, toy: bool) -> Iterator[Case]:
    """Training steps at full depth, the setting that is recommended first."""
    shape, layers, tokens, repeats = (TOY_SHAPE, 2, 32, 1) if toy else (LLAMA_8B, 32, 4096, 3)
    for name, spec in WHOLE.items():
        what = {"case": f"{layers} layers, 1 x {tokens} tokens", "way": name, "head": head()}
        theirs = "bitsandbytes" in spec
        yield Case(what, lambda s=spec: whole(s, shape, layers, tokens, device, repeats), theirs=theirs)
