"""Time and memory of `hf-lowmem plan` itself, for the models that people ask about: each a process of its own.

    python scripts/bench/plan_headlines.py          # about a minute on one core; writes records/plan_headlines.jsonl
    python scripts/bench/plan_headlines.py --toy    # one tiny model; nothing is written

What is run is the command as a user types it, imports included. `seconds` is wall time, `cpu_seconds` what the process
computed for, `rss` the largest resident set that the system counted for it. The exit status is 1 where a plan took more
than a minute or 4 GiB.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parts.record import RECORDS, provenance, write_rows
from parts.shapes import LLAMA_8B, TOY_SHAPE

RECORD = RECORDS / "plan_headlines.jsonl"
SECONDS, RSS = 60, 4 * 2**30
PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft")
LLAMA = {"model_type": "llama", "max_position_embeddings": 8192}
EIGHT = LLAMA | LLAMA_8B | {"num_hidden_layers": 32}
SEVENTY = EIGHT | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
QWEN_3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}
SMOLLM2_135M = LLAMA | {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
ADAMW = ("--optim", "adamw_torch")
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "Llama-3-8B, AdamW for-loop": (EIGHT, (*ADAMW, "--implementation", "for-loop")),
    "Llama-3-8B, AdamW foreach": (EIGHT, (*ADAMW, "--implementation", "foreach")),
    "Llama-3-8B, AdamW fused": (EIGHT, (*ADAMW, "--implementation", "fused")),
    "Llama-3-70B on 8 FSDP2 shards": (SEVENTY, (*ADAMW, "--world_size", "8", "--parallel", "fsdp2")),
    "Qwen3-8B, LoRA": (QWEN_3_8B, (*ADAMW, "--use_peft", "--lora_target_modules", "all-linear")),
    "SmolLM2-135M": (SMOLLM2_135M, ADAMW),
}
TOY_CASES = {"toy": (LLAMA | TOY_SHAPE | {"num_hidden_layers": 2}, ADAMW)}


def row(config: dict[str, Any], flags: Sequence[str], tokens: int) -> dict[str, Any]:
    """One plan by the command line. Raises RuntimeError with its last line where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        model, shown, errors = (Path(folder) / name for name in ("config.json", "plan.json", "errors"))
        model.write_text(json.dumps(config))
        asked = ["--dtype", "bfloat16", "--max_length", str(tokens), "--per_device_train_batch_size", "1", *flags]
        command = [sys.executable, "-m", "hf_lowmem.cli.main", "plan", "--model", str(model), *asked, "--json"]
        began = time.perf_counter()
        with shown.open("w") as out, errors.open("w") as err:
            process = subprocess.Popen(command, stdout=out, stderr=err, cwd=folder)
            _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        if status:
            raise RuntimeError(errors.read_text().splitlines()[-1])
        made = json.loads(shown.read_text())
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return {
        "flags": " ".join(asked),
        "peak_bytes": made["peak_bytes"],
        "parts": made["parts"],
        "peak_in": f"{made['phase']}, {made['module']}",
        "depths": made["depths"],
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "rss": usage.ru_maxrss * unit,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="one tiny model; nothing is written")
    toy = parser.parse_args(arguments).toy
    common = {
        "command": "python scripts/bench/plan_headlines.py",
        **provenance(PACKAGES),
    }
    rows, over = [], False
    for name, (config, flags) in (TOY_CASES if toy else CASES).items():
        made = row(config, flags, 32 if toy else 2048)
        rows.append({"case": name} | made | common)
        over |= made["seconds"] > SECONDS or made["rss"] > RSS
        print(
            f"{name:<32} peak {made['peak_bytes'] / 2**30:7.2f} GiB, planned in {made['seconds']:.1f} s "
            f"({made['cpu_seconds']:.1f} s of computing) and {made['rss'] / 2**30:.2f} GiB",
            flush=True,
        )
        if not toy:
            write_rows(RECORD, rows)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
