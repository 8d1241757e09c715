"""`hf-lowmem demo --smallest`: the least memory in which all weights of the model are trained, beside HuggingFace's.

SFT alone, three times, with the same data, order and number of steps: as HuggingFace does it, in fp32; as it does it in
least memory, in bf16 with checkpointing; and with everything here that takes memory away. The last two differ in more
than memory: their weights are bf16 or codes, whose updates are rounded, and the losses say what that cost.
"""

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from datasets import Dataset

import hf_lowmem
from hf_lowmem.demo import report
from hf_lowmem.demo.process import alone
from hf_lowmem.demo.run import FULL, PACKAGES, QUICK, RATES, Size, common, gather, public_name
from hf_lowmem.demo.runs import Run
from hf_lowmem.runs import facts

__all__ = ["SMALLEST", "run_smallest"]

# The model's embedding is its head, so that a rule for both keeps a first moment at least; adam_mini's is that and one
# number a token, at AdamW's rates.
SMALLEST: dict[str, object] = {
    "optim": "apollo_mini",
    "lowmem_state": "8bit",
    "lowmem_embeddings": "adam_mini",
    "lowmem_weights": "int8_sr",
    "lowmem_activations": "checkpoint_fp8",
    "lowmem_step_in_backward": True,
    "max_grad_norm": 0.0,
}


def run_smallest(*, model: str | None, output_dir: Path, quick: bool, seed: int, command: Sequence[str]) -> int:
    """Run it; the exit status. Writes smallest.json under `output_dir`."""
    began = time.perf_counter()
    console = report.screen()
    size = QUICK if quick else FULL
    output_dir.mkdir(parents=True, exist_ok=True)
    material = gather(size, seed)
    console.print(f"Loading {public_name(model)}.")
    base = alone("prepare_model", model, output_dir)
    results = [alone("train", run, material.referee) for run in runs(base, material.texts, size, output_dir, seed)]
    record = {
        "command": shlex.join(command),
        "base_model": public_name(model),
        "mode": "quick" if quick else "full",
        "seed": seed,
        "size": asdict(size),
        "heldout_plays": material.heldout_plays,
        "before": results[0].heldout[0][1],
        "training": report.training_rows(results),
        "versions": facts.versions_of(PACKAGES),
        "device": facts.device_name(),
        "commit": facts.commit_of(Path(hf_lowmem.__file__).parent.parent),
        "runs": [asdict(result) for result in results],
        "seconds": time.perf_counter() - began,
    }
    (output_dir / "smallest.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    rows = record["training"]
    console.print(report.training_table(rows))
    console.print(
        f"MiB; peak: {rows[0]['peak_source']}. Losses in nats a token; held-out before training {record['before']:.3f}."
        f"\nWritten to {output_dir / 'smallest.json'}; {record['seconds']:.0f} s in all.",
        highlight=False,
    )
    return 0


def runs(base: str, texts: Dataset, size: Size, output_dir: Path, seed: int) -> list[Run]:
    """HuggingFace's two ways, and the smallest."""
    shared = common(size.sft_steps, size.sft_batch, size.tokens, seed)
    theirs = {"optim": "adamw_torch", "learning_rate": RATES["adamw_torch"]}
    ours = SMALLEST | {"learning_rate": RATES["apollo_mini"]}
    ways = [
        ("HuggingFace, fp32", "trl.SFTTrainer", "float32", theirs),
        ("HuggingFace, bf16, checkpointing", "trl.SFTTrainer", "bfloat16", theirs | {"gradient_checkpointing": True}),
        ("smallest", "LowMemSFTTrainer", "bfloat16", ours),
    ]
    return [
        Run(
            name=name,
            trainer=trainer,
            model=base,
            dataset=texts,
            settings=shared | settings,
            output=str(output_dir / "runs" / str(place)),
            evaluate_at=(0, size.sft_steps),
            dtype=dtype,
        )
        for place, (name, trainer, dtype, settings) in enumerate(ways)
    ]
