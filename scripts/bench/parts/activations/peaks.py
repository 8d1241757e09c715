"""Parts peaks: what a whole step of an 8B model would take, weighed without a device."""

import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from hf_lowmem.kernels import spans
from hf_lowmem.specs import TIERS
from parts.activations.models import prepared
from parts.record import Row, Rows
from parts.tracked import total

PEAK_TOKENS = (2048, 16384)


def peak_rows(smoke: bool, old: Rows) -> Iterator[Row]:
    """A step of a bf16 Llama-3-8B under FakeTensorMode: nothing is allocated, every tensor is counted."""
    layers, lengths = (2, (64,)) if smoke else (32, PEAK_TOKENS)
    spans.CPU_SPAN_PER_THREAD = spans.ACCELERATOR_SPAN  # fake CPU tensors stand for a device's
    for tokens in lengths:
        for way in ("HuggingFace", "checkpointing", *TIERS):
            for freed in (False, True):
                yield peak_row(way, layers, tokens, smoke, freed)


def peak_row(way: str, layers: int, tokens: int, smoke: bool, freed: bool) -> Row:
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
