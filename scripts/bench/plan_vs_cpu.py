"""Does a plan foretell a real step? Ten settings of a real model of 30 million parameters, on the CPU.

    python scripts/bench/plan_vs_cpu.py            # about five minutes on one core; writes records/plan_vs_cpu.jsonl
    python scripts/bench/plan_vs_cpu.py --smoke    # one setting of a tiny model, printed

Weights, gradients and states are what model and optimizer hold; what is saved for backward is counted by autograd's
hooks around the loss, in the first step; the peak is the CPU allocator's own trace of two whole steps, temporaries
inside operators included. Rows have the foretold and the measured bytes and their ratio. bitsandbytes is an eleventh
row: on a CPU its update is emulated with large temporaries inside of one operator, which a plan does not see and a GPU
does not have.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[2]))  # tests/planner has the way of weighing a real step

from hf_lowmem.dpo import LowMemDPOConfig
from hf_lowmem.planner import plan
from hf_lowmem.sft import LowMemSFTConfig
from tests.planner.real import measure

RECORD = Path(__file__).parent / "records" / "plan_vs_cpu.jsonl"
MODEL: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "max_position_embeddings": 256,
}
TINY = MODEL | {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "vocab_size": 256}
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
    (
        "ours: apollo_mini 8bit, checkpoint_fp8, step in backward",
        "bfloat16",
        {
            "optim": "apollo_mini",
            "lowmem_state": "8bit",
            "lowmem_activations": "checkpoint_fp8",
            "lowmem_step_in_backward": True,
            "max_grad_norm": 0,
        },
    ),
    (
        "ours: galore, bf16_ecc weights",
        "bfloat16",
        {"optim": "galore", "lowmem_rank": 32, "lowmem_weights": "bf16_ecc"},
    ),
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
    made = plan(LlamaConfig(**model), args, dtype=dtype, device="cpu")
    real = measure(LlamaConfig(**model), args, getattr(torch, dtype), reference="loss_type" in settings)
    held = [point for point in made.timeline if point.phase == "optimizer"][-1].parts
    foretold = {
        "weights": held["weights"],
        "gradients": held.get("gradients", 0),
        "states": held["states"],
        "saved": made.saved_bytes,
        "peak": made.peak_bytes,
    }
    measured = vars(real)
    ratios = {k: foretold[k] / measured[k] if measured[k] else float(foretold[k] == 0) for k in foretold}
    return {
        "setting": name,
        "dtype": dtype,
        "tokens": tokens,
        "parameters": made.settings["parameters"],
        "foretold": foretold,
        "measured": measured,
        "ratio": ratios,
        "peak_in": f"{made.phase}, {made.module}",
        "seconds_to_plan": round(made.seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one setting of a tiny model; nothing is written")
    smoke = parser.parse_args().smoke
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RECORD.parent
    ).stdout.strip()
    rows = []
    for name, dtype, settings in SETTINGS[:1] if smoke else SETTINGS:
        rows.append(row(name, dtype, settings, TINY if smoke else MODEL, tokens=48 if smoke else 128))
        print(f"{name:<58}", *(f"{k} {v:.4f}" for k, v in rows[-1]["ratio"].items()), rows[-1]["peak_in"], flush=True)
    if not smoke:
        head = {"torch": torch.__version__, "commit": commit, "device": "cpu", "model": MODEL}
        RECORD.write_text("".join(json.dumps(line) + "\n" for line in [head, *rows]))


if __name__ == "__main__":
    main()
