"""Part plan: the peak that `hf_lowmem.planner.plan` foretells beside the one that the CUDA allocator counts.

A Llama of the 8B model's layer shape at reduced depth, random weights, through LowMemSFTTrainer itself: two steps on
full rows. On a CPU the training runs, and nothing counts its peak: scripts/bench/plan_vs_cpu.py does that by a trace.
"""

import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from _gpu_time import free, peak_bytes
from _gpu_training import LLAMA_8B, TOY_SHAPE

SETTINGS: dict[str, dict[str, Any]] = {
    "AdamW fused": {"optim": "adamw_torch_fused", "gradient_checkpointing": False},
    "AdamW foreach": {"optim": "adamw_torch", "gradient_checkpointing": False},
    "AdamW fused, checkpointing": {"optim": "adamw_torch_fused", "gradient_checkpointing": True},
    "AdamW fused, 2 micro-batches": {
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": False,
        "gradient_accumulation_steps": 2,
    },
    "adamw 8bit": {"optim": "adamw", "lowmem_state": "8bit", "gradient_checkpointing": False},
    "adamw 8bit bf16_sr, exact": {
        "optim": "adamw",
        "lowmem_state": "8bit",
        "lowmem_weights": "bf16_sr",
        "lowmem_activations": "exact",
    },
    "adamw 8bit bf16_sr, fp8": {
        "optim": "adamw",
        "lowmem_state": "8bit",
        "lowmem_weights": "bf16_sr",
        "lowmem_activations": "fp8",
    },
    "adamw 8bit bf16_sr, fp8_recompute": {
        "optim": "adamw",
        "lowmem_state": "8bit",
        "lowmem_weights": "bf16_sr",
        "lowmem_activations": "fp8_recompute",
    },
    "apollo_mini 8bit bf16_sr, checkpoint_fp8, step in backward": {
        "optim": "apollo_mini",
        "lowmem_state": "8bit",
        "lowmem_weights": "bf16_sr",
        "lowmem_activations": "checkpoint_fp8",
        "lowmem_step_in_backward": True,
        "max_grad_norm": 0.0,
    },
    "galore 8bit bf16_ecc": {
        "optim": "galore",
        "lowmem_state": "8bit",
        "lowmem_weights": "bf16_ecc",
        "gradient_checkpointing": False,
    },
}


def tokenizer() -> Any:
    """Enough of one for SFTTrainer: rows come tokenised."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def row(
    settings: dict[str, Any], shape: dict[str, Any], layers: int, tokens: int, device: torch.device
) -> dict[str, Any]:
    """Foretold and measured peak of one setting, bytes."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_lowmem import LowMemSFTConfig, LowMemSFTTrainer
    from hf_lowmem.planner import plan

    sizes: dict[str, Any] = {"num_hidden_layers": layers, "max_position_embeddings": tokens, "pad_token_id": 0}
    config = LlamaConfig(**shape | sizes)
    with tempfile.TemporaryDirectory() as folder:
        values: dict[str, Any] = {
            "use_cpu": device.type == "cpu",
            "bf16": False,
            "max_length": tokens,
            "per_device_train_batch_size": 1,
            "max_steps": 2,
            "report_to": "none",
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
        }
        args = LowMemSFTConfig(folder, **values | settings)
        made = plan(config, args, dtype="bfloat16", device=device.type)
        free(device)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with device:
                model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
        rows = [{"input_ids": [3 + (i + j) % 90 for j in range(tokens)]} for i in range(8)]
        trainer = LowMemSFTTrainer(
            model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer()
        )
        trainer.train()
    measured = peak_bytes(device)
    return {
        "foretold": made.peak_bytes,
        "foretold_reserved": made.reserved_bytes,
        "parts": made.parts,
        "phase": made.phase,
        "measured": measured,
        "difference": None if measured is None else made.peak_bytes / measured - 1,
        "seconds_to_plan": made.seconds,
    }


def rows(device: torch.device, toy: bool, in_time: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    if not find_spec("trl") or not find_spec("datasets"):
        yield {"setting": "all", "note": "ModuleNotFoundError: No module named 'trl'; what is planned is its trainer"}
        return
    shape, layers, tokens = (TOY_SHAPE, 2, 32) if toy else (LLAMA_8B, 8, 2048)
    for name, settings in list(SETTINGS.items())[:: 4 if toy else 1]:
        if not in_time():
            yield {"setting": name, "note": "left out: no time"}
            continue
        try:
            yield {"setting": name, "layers": layers, "tokens": tokens} | row(settings, shape, layers, tokens, device)
        except torch.OutOfMemoryError as error:
            yield {"setting": name, "note": str(error)[:200]}
