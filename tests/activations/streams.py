"""Batches and models for streamed layers, and how far their gradients are from HuggingFace's."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowmem.activations import convert
from hf_lowmem.specs import ActivationSpec
from tests.activations.models import EXPERTS, batch, build, loss_and_gradients

TOKENS = 29
LAYOUTS = ("plain", "right", "left", "packed")
CHUNKS = (1, 7, 8, TOKENS)
# GPT-2 has dropouts where others have none: their masks are drawn chunk by chunk, so they are not HuggingFace's.
STILL: dict[str, dict[str, Any]] = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0}}


# Families whose norms' products or scores are of float32 also in a float64 model: no sum comes nearer than `floor`.
FLOORED = ("gemma", "gemma2", "gemma3", "cohere", "cohere2", *EXPERTS)


def model_of(family: str, **changes: Any) -> Any:
    """In float64, or in float32 where an operator of its experts has no other."""
    dtype = torch.float32 if family in EXPERTS else torch.float64
    return build(family, dtype, **STILL.get(family, {}) | changes)


def laid_out(layout: str, rows: int = 2) -> dict[str, Any]:
    """A batch without padding, padded on a side, or of rows of several documents; without a cache, beside which
    transformers sees no documents."""
    made: dict[str, Any] = batch(TOKENS, rows) | {"use_cache": False}
    if layout in ("right", "left"):
        mask = torch.ones_like(made["input_ids"])
        mask[-1, -6:] = 0
        made["attention_mask"] = mask if layout == "right" else mask.flip(-1)
        made["labels"] = made["labels"].masked_fill(made["attention_mask"] == 0, -100)
    if layout == "packed":
        documents = torch.cat([torch.arange(n) for n in (11, 13, TOKENS - 24)])
        made["position_ids"] = documents[None].expand(rows, -1)
    return made


def streamed(model: Any, chunk: int | None, tiers: str = "stream") -> Any:
    """A copy, converted."""
    model = copy.deepcopy(model)
    convert(model, ActivationSpec(tiers=tiers, chunk=chunk))
    return model


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of a gradient's value, in units of that gradient's largest."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - g).abs().max() / g.abs().max().clamp(min=1e-30)) for n, g in theirs.items())


def bound_of(family: str, model: nn.Module, inputs: dict[str, Any], theirs: dict[str, Tensor]) -> float:
    """How far gradients may be from HuggingFace's."""
    return max(1e-12, 3 * floor(model, inputs, theirs)) if family in FLOORED else 1e-12


def floor(model: nn.Module, inputs: dict[str, Any], theirs: dict[str, Tensor]) -> float:
    """How much HuggingFace's own gradients move when its weights do in the last bits of float32: where it computes in
    float32 inside of a float64 model, no sum in another order can come nearer. 0 where it does not."""
    casts = {"now": 0}

    class Counting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **kwargs or {})
            if isinstance(out, Tensor) and out.dtype == torch.float32 and out.ndim > 2:
                casts["now"] += out.requires_grad
            return out

    with Counting():
        loss_and_gradients(model, inputs)
    if not casts["now"]:
        return 0.0
    moved, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in moved.parameters():
            p.mul_(1 + 2.0**-24 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return distance(loss_and_gradients(moved, inputs)[1], theirs)
