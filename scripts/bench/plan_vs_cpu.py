"""Does a plan predict a real step? Settings of a real model of 30 million parameters, and one of 135, on the CPU.

    python scripts/bench/plan_vs_cpu.py            # about five minutes on one core; writes records/plan_vs_cpu.jsonl
    python scripts/bench/plan_vs_cpu.py --only "as the demo's --smallest"     # this row alone; the others stay
    python scripts/bench/plan_vs_cpu.py --smoke    # two settings of a tiny model, printed

Weights, gradients and states are what model and optimizer hold; what is saved for backward is counted by autograd's
hooks around the loss, in the first step; the peak is the CPU allocator's own trace of two whole steps, temporaries
inside operators included. Rows have the predicted and the measured bytes and their ratio. Two more rows are QLoRA, and
bitsandbytes' optimizer: on a CPU its update is emulated with large temporaries inside of one operator, which a plan
does not see and a GPU does not have. One row is SmolLM2-135M as `hf-lowmem demo --smallest` trains it, in fewer steps.
"""

import argparse
import sys
import tempfile
import warnings
from typing import Any

import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig, LlamaConfig

from parts.record import RECORDS, ROOT, provenance, read_rows, write_rows

sys.path.insert(0, str(ROOT))  # tests/planner has the way of weighing a real step

from hf_lowmem.demo.run import FULL
from hf_lowmem.demo.smallest import SMALLEST as OF_DEMO
from hf_lowmem.planner import plan
from hf_lowmem.training.dpo import LowMemDPOConfig
from hf_lowmem.training.sft import LowMemSFTConfig
from tests.planner.real import measure

RECORD = RECORDS / "plan_vs_cpu.jsonl"
PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "bitsandbytes")
MODEL: dict[str, object] = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "max_position_embeddings": 256,
}
SMOLLM2: dict[str, object] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
DEMO = "SmolLM2-135M, as the demo's --smallest"
TINY = MODEL | {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "vocab_size": 256}
SMALLEST: dict[str, object] = {
    "optim": "apollo_mini",
    "lowmem_state": "8bit",
    "lowmem_activations": "checkpoint_fp8",
    "lowmem_step_in_backward": True,
    "max_grad_norm": 0,
}
QLORA = "QLoRA: nf4 base weights in blocks of blocks, checkpointing"
SETTINGS: list[tuple[str, str, dict[str, Any]]] = [
    ("AdamW, fp32", "float32", {"optim": "adamw_torch"}),
    ("AdamW, fp32 weights, bf16 autocast", "float32", {"optim": "adamw_torch", "bf16": True}),
    ("fused AdamW, pure bf16", "bfloat16", {"optim": "adamw_torch_fused"}),
    ("AdamW, pure bf16, checkpointing", "bfloat16", {"optim": "adamw_torch", "gradient_checkpointing": True}),
    ("AdamW, pure bf16, 3 micro-batches", "bfloat16", {"optim": "adamw_torch", "gradient_accumulation_steps": 3}),
    ("DPO with a reference model, pure bf16", "bfloat16", {"loss_type": "sigmoid", "optim": "adamw_torch_fused"}),
    (
        "ours: adamw 8bit, exact activations",
        "bfloat16",
        {"optim": "adamw", "lowmem_state": "8bit", "lowmem_activations": "exact"},
    ),
    (
        "ours: adamw 8bit, fp8 activations",
        "bfloat16",
        {"optim": "adamw", "lowmem_state": "8bit", "lowmem_activations": "fp8"},
    ),
    ("ours: apollo_mini 8bit, checkpoint_fp8, step in backward", "bfloat16", SMALLEST),
    (
        "the same, scale for embedding and head, bf16_sr weights",
        "bfloat16",
        SMALLEST | {"lowmem_embeddings": "scale", "lowmem_weights": "bf16_sr"},
    ),
    ("the same, int8_sr weights", "bfloat16", SMALLEST | {"lowmem_weights": "int8_sr"}),
    (
        "ours: galore, bf16_ecc weights",
        "bfloat16",
        {"optim": "galore", "lowmem_rank": 32, "lowmem_weights": "bf16_ecc"},
    ),
    (QLORA, "bfloat16", {"optim": "adamw_torch_fused", "gradient_checkpointing": True}),
    (DEMO, "bfloat16", OF_DEMO | {"per_device_train_batch_size": FULL.sft_batch}),
    ("bitsandbytes adamw_8bit, pure bf16", "bfloat16", {"optim": "adamw_8bit"}),
]


def arguments(settings: dict[str, Any], tokens: int) -> Any:
    checkpointing = None if "lowmem_activations" in settings else False
    values: dict[str, Any] = {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": checkpointing,
        "max_length": tokens,
        "per_device_train_batch_size": 1,
        "max_steps": 2,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    config: Any = LowMemDPOConfig if "loss_type" in settings else LowMemSFTConfig
    return config(tempfile.mkdtemp(), **values | settings)


def row(name: str, dtype: str, settings: dict[str, Any], model: dict[str, Any], tokens: int) -> dict[str, Any]:
    args = arguments(settings, tokens)
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if name == QLORA else None
    base = (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
        if name == QLORA
        else None
    )
    made = plan(LlamaConfig(**model), args, dtype=dtype, device="cpu", peft_config=lora, quantization_config=base)
    options: dict[str, Any] = {"peft_config": lora, "quantization": base, "reference": "loss_type" in settings}
    real = measure(LlamaConfig(**model), args, getattr(torch, dtype), **options)
    # After an update that makes nothing new there is no moment of the optimizer's own, but its end.
    held = [point for point in made.timeline if point.phase in ("optimizer", "end")][-1].parts
    predicted = {
        "weights": held["weights"],
        "gradients": held.get("gradients", 0),
        "states": held["states"],
        "saved": made.saved_bytes,
        "peak": made.peak_bytes,
    }
    measured = vars(real)
    ratios = {k: predicted[k] / measured[k] if measured[k] else float(predicted[k] == 0) for k in predicted}
    return {
        "setting": name,
        "model": model,
        "dtype": dtype,
        "tokens": tokens,
        "parameters": made.settings["parameters"],
        "foretold": predicted,
        "measured": measured,
        "ratio": ratios,
        "peak_in": f"{made.phase}, {made.module}",
        "seconds_to_plan": round(made.seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two settings of a tiny model; nothing is written")
    parser.add_argument("--only", default="", help="the settings with this in their name; other rows stay")
    options = parser.parse_args()
    smoke, only = options.smoke, options.only
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    common = {
        "command": "python scripts/bench/plan_vs_cpu.py",
        **provenance(PACKAGES),
    }
    rows = {made["setting"]: made for made in read_rows(RECORD)} if only else {}
    for name, dtype, settings in SETTINGS[:: len(SETTINGS) - 3] if smoke else SETTINGS:
        if only not in name:
            continue
        model = TINY if smoke else SMOLLM2 if name == DEMO else MODEL
        made = row(name, dtype, settings, model, tokens=48 if smoke else 128)
        rows[name] = made | common
        print(f"{name:<58}", *(f"{k} {v:.4f}" for k, v in made["ratio"].items()), made["peak_in"], flush=True)
    if not smoke:
        write_rows(RECORD, [rows[name] for name, _, _ in SETTINGS])


if __name__ == "__main__":
    main()
