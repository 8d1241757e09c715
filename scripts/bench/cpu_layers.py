"""Layers of a model on a CPU: forward and backward by tier, with kernels that numba compiles and by the reference.

    python scripts/bench/cpu_layers.py                # ten minutes of one core; writes records/cpu_layers.jsonl
    python scripts/bench/cpu_layers.py --report       # the table of the record

Four decoder layers of SmolLM2-135M's shape in fp32 and 256 tokens, one thread. Every round runs every way once on the
same model. What counts is the CPU time of a way divided by that of HuggingFace's own layers in the very same round, the
median over the rounds: other programs on the machine take nothing of it.
"""

import argparse
import statistics
import sys
import time

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from _readme import TABLES
from hf_lowmem.activations import convert, undo
from hf_lowmem.kernels import use_kernels
from hf_lowmem.kernels.proof import cpu_name
from hf_lowmem.kernels.registry import INSTALL, has_numba
from parts.record import RECORDS, Row, Rows, commit, versions_of, write_rows

RECORD = RECORDS / "cpu_layers.jsonl"
PLAIN, CHECKPOINTING = "HuggingFace", "HuggingFace, checkpointing"
TIERS = ("exact", "fp8", "fp8_recompute", "hooks_fp8", "checkpoint_fp8")
IMPLS = {"kernels": "auto", "reference": "reference"}
SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}


def model_of(layers: int) -> LlamaModel:
    torch.manual_seed(0)
    config = LlamaConfig.from_dict({"num_hidden_layers": layers, "vocab_size": 64, "use_cache": False, **SHAPE})
    return LlamaModel(config).train()


def cpu_seconds(model: nn.Module, x: Tensor) -> float:
    """CPU time of all threads for one forward and backward pass."""
    model.zero_grad()
    began = time.process_time()
    model(inputs_embeds=x).last_hidden_state.square().mean().backward()
    return time.process_time() - began


def measure(rounds: int, *, layers: int = 4, tokens: int = 256) -> Rows:
    """A row for each way: HuggingFace's two, and each tier with kernels and without."""
    model, x = model_of(layers), torch.randn(1, tokens, SHAPE["hidden_size"])
    ways = [(PLAIN, ""), (CHECKPOINTING, ""), *((tier, runs) for tier in TIERS for runs in IMPLS)]
    times: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    for _ in range(rounds + 1):  # the first one compiles
        for way, runs in ways:
            with use_kernels(IMPLS.get(runs, "auto")):
                times[way, runs].append(_once(model, x, way))
    plain = times[PLAIN, ""][1:]
    rows = []
    for (way, runs), found in times.items():
        ratio = statistics.median(one / other for one, other in zip(found[1:], plain, strict=True))
        milliseconds = 1e3 * statistics.median(found[1:])
        rows.append({"way": way, "runs": runs, "milliseconds": round(milliseconds, 1), "ratio": round(ratio, 3)})
    return rows


def _once(model: LlamaModel, x: Tensor, way: str) -> float:
    if way == PLAIN:
        return cpu_seconds(model, x)
    if way == CHECKPOINTING:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            return cpu_seconds(model, x)
        finally:
            model.gradient_checkpointing_disable()
    convert(model, way)
    try:
        return cpu_seconds(model, x)
    finally:
        undo(model)


def report() -> str:
    """README's table of the record."""
    return "\n".join(TABLES["cpu_layers"]())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--report", action="store_true", help="only print the table of the record")
    args = parser.parse_args()
    if not args.report:
        if not has_numba():
            parser.error(f"numba is not installed, so there are no kernels to measure: {INSTALL}")
        torch.set_num_threads(1)
        common: Row = {
            "command": f"python scripts/bench/cpu_layers.py --rounds {args.rounds}",
            "device": cpu_name(),
            "threads": 1,
            "versions": versions_of(("torch", "transformers", "numba", "llvmlite")),
            "commit": commit(),
        }
        write_rows(RECORD, [row | common for row in measure(args.rounds)])
    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
