"""Predicted and measured peaks: the one table of settings, and how one of them is measured, in a process of its own.

`plan_vs_cuda.py` runs all of them and writes their record.
Models have random weights and the layer shape of a known one at reduced depth, so that even AdamW's fp32 states fit a
card of 80 GB. Each trains two steps on full rows by the trainer itself. On a CUDA device the measured peak is the
caching allocator's since the first step began; on a CPU (`--toy`) it is the trace of the CPU allocator, as in
`plan_vs_cpu.py`, so that every line here runs where there is no device.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from parts.gpu.timing import free
from parts.record import ROOT, Row
from parts.shapes import LLAMA_8B, TOY_SHAPE

sys.path.insert(0, str(ROOT))  # tests/planner has the way of weighing a real step

TIED = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
ABOVE, BELOW = 0.03, 0.01  # the aim: at most 3 % more than was taken, and never more than 1 % less


@dataclass(frozen=True)
class Setting:
    """fields: of the trainer's config. shape: of a Llama. adapters: whether LoRA trains instead of all weights.
    four_bits: whether the base weights are bitsandbytes' nf4."""

    fields: dict[str, Any]
    shape: dict[str, Any] = field(default_factory=lambda: LLAMA_8B)
    layers: int = 8
    tokens: int = 2048
    dtype: str = "bfloat16"
    pairs: bool = False
    adapters: bool = False
    four_bits: bool = False

    def toy(self) -> "Setting":
        tied = {"tie_word_embeddings": self.shape.get("tie_word_embeddings", False)}
        return replace(self, shape=TOY_SHAPE | tied, layers=2, tokens=self.tokens // 64)


FUSED: dict[str, Any] = {"optim": "adamw_torch_fused", "gradient_checkpointing": False}
CHECKPOINTED = FUSED | {"gradient_checkpointing": True}
EIGHT_BIT: dict[str, Any] = {"optim": "adamw", "lowmem_state": "8bit", "lowmem_weights": "bf16_sr"}
LEAST = EIGHT_BIT | {
    "optim": "apollo_mini",
    "lowmem_activations": "checkpoint_fp8",
    "lowmem_step_in_backward": True,
    "max_grad_norm": 0.0,
}
SETTINGS: dict[str, Setting] = {
    "AdamW fused": Setting(FUSED),
    "AdamW foreach": Setting(FUSED | {"optim": "adamw_torch"}),
    "AdamW fused, checkpointing": Setting(CHECKPOINTED),
    "AdamW fused, checkpointing, 8,192 tokens": Setting(CHECKPOINTED, tokens=8192),
    "AdamW fused, 4 micro-batches": Setting(FUSED | {"gradient_accumulation_steps": 4}),
    "AdamW fused, fp32 weights under bf16 autocast": Setting(FUSED | {"bf16": True}, layers=2, dtype="float32"),
    "AdamW fused, 4 rows": Setting(CHECKPOINTED | {"per_device_train_batch_size": 4}),
    "HF adamw_8bit, checkpointing": Setting(CHECKPOINTED | {"optim": "adamw_8bit"}),
    "adamw 8bit bf16_sr, exact": Setting(EIGHT_BIT | {"lowmem_activations": "exact"}),
    "adamw 8bit bf16_sr, fp8": Setting(EIGHT_BIT | {"lowmem_activations": "fp8"}),
    "adamw 8bit bf16_sr, fp8_recompute, 8,192 tokens": Setting(
        EIGHT_BIT | {"lowmem_activations": "fp8_recompute"}, tokens=8192
    ),
    "apollo 8bit bf16_sr, checkpoint_fp8": Setting(
        EIGHT_BIT | {"optim": "apollo", "lowmem_activations": "checkpoint_fp8"}
    ),
    "apollo_mini 8bit bf16_sr, checkpoint_fp8, step in backward": Setting(LEAST),
    "galore 8bit bf16_ecc": Setting(FUSED | {"optim": "galore", "lowmem_state": "8bit", "lowmem_weights": "bf16_ecc"}),
    "lion int8, checkpointing": Setting(CHECKPOINTED | {"optim": "lion", "lowmem_state": "int8"}),
    "LoRA, AdamW fused, checkpointing": Setting(CHECKPOINTED, adapters=True),
    "QLoRA, AdamW fused, checkpointing": Setting(CHECKPOINTED, adapters=True, four_bits=True),
    "DPO with a reference, AdamW fused, checkpointing": Setting(
        CHECKPOINTED | {"loss_type": "sigmoid"}, tokens=1024, pairs=True
    ),
    "ASFT, adamw 8bit bf16_sr, fp8": Setting(
        EIGHT_BIT | {"loss_type": "asft", "lowmem_activations": "fp8"}, tokens=1024, pairs=True
    ),
    "tied embeddings, AdamW fused under bf16 autocast": Setting(FUSED | {"bf16": True}, shape=TIED, layers=24),
}
TOYS = (
    "apollo_mini 8bit bf16_sr, checkpoint_fp8, step in backward",
    "QLoRA, AdamW fused, checkpointing",
    "AdamW fused, fp32 weights under bf16 autocast",
)


def row(setting: Setting, device: torch.device) -> Row:
    """Predicted and measured bytes of one setting."""
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, LlamaConfig

    from hf_lowmem.planner import plan
    from hf_lowmem.training.dpo import LowMemDPOConfig
    from hf_lowmem.training.sft import LowMemSFTConfig

    sizes: dict[str, Any] = {"num_hidden_layers": setting.layers, "max_position_embeddings": setting.tokens}
    config = LlamaConfig(**setting.shape | sizes)
    dtype: torch.dtype = getattr(torch, setting.dtype)
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if setting.adapters else None
    four_bits = (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        if setting.four_bits
        else None
    )
    arguments: Any = LowMemDPOConfig if setting.pairs else LowMemSFTConfig
    values: dict[str, Any] = {
        "use_cpu": device.type == "cpu",
        "bf16": False,
        "max_length": setting.tokens,
        "per_device_train_batch_size": 1,
        "max_steps": 2,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder, **values | setting.fields)
        options: dict[str, Any] = {"peft_config": lora}
        made = plan(config, args, dtype=dtype, quantization_config=four_bits, device=device.type, **options)
        free(device)
        options |= {"reference": setting.fields.get("loss_type") == "sigmoid", "quantization": four_bits}
        measured = _measured(config, args, dtype, device, options)
    return {
        "foretold": made.peak_bytes,
        "foretold_reserved": made.reserved_bytes,
        "parts": made.parts,
        "peak_in": f"{made.phase}, {made.module}",
        "depths": made.depths,
        **measured,
        "difference": made.peak_bytes / measured["measured"] - 1,
        "seconds_to_plan": round(made.seconds, 1),
    }


def _measured(
    config: Any, args: Any, dtype: torch.dtype, device: torch.device, options: dict[str, Any]
) -> dict[str, Any]:
    """`context` is what the card had given out beside the allocator's blocks when the run ended: right where nobody
    else uses the card."""
    from tests.planner import real

    if device.type == "cpu":
        return {"measured": real.measure(config, args, dtype, **options).peak}
    trainer = real.trainer_of(config, args, dtype, callbacks=[real.ResetPeak()], device=device, **options)
    trainer.train()
    free_bytes, total = torch.cuda.mem_get_info(device)
    return {
        "measured": torch.cuda.max_memory_allocated(device),
        "measured_reserved": torch.cuda.max_memory_reserved(device),
        "context": total - free_bytes - torch.cuda.memory_reserved(device),
    }


def in_own_process(name: str, toy: bool) -> Row:
    """The row of one setting, or a note that says why there is none. The allocator is as it comes, whatever this
    process sets."""
    command = [sys.executable, str(ROOT / "scripts" / "bench" / "plan_vs_cuda.py"), "--one", name, *(["--toy"] * toy)]
    env = {name: value for name, value in os.environ.items() if name != "PYTORCH_ALLOC_CONF"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"note": lines[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])
