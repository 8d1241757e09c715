"""What fits in 16, 24, 48 and 80 GiB: the settings that `lowmem_budget` chooses for Llama-3-8B, and how long it takes.

    python scripts/bench/budget.py               # writes records/budget.jsonl; about ten minutes of a quiet core
    python scripts/bench/budget.py --budget 16GiB --batch 1    # this row alone; the others of the record stay
    python scripts/bench/budget.py --model 1b    # Llama-3.2-1B's shape, eight sequences: records/budget_1b.jsonl
    python scripts/bench/budget.py --toy         # a tiny model, printed

bf16 weights, 2,048 tokens, on a GPU that need not be there. A row for each micro-batch (1, and 8, which the search may
split) and budget: the choice or the reason why there is none, its need (planned again here, by a plan of its own, from
the chosen arguments), the nearest of what would have been preferred, the number of combinations, seconds and processor
seconds. Then the longest sequence in 24 GiB with apollo_mini. The budgets of a micro-batch share the simulations of
their estimates, whose seconds are given apart; a search on its own takes both.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from hf_lowmem import LowMemSFTConfig
from hf_lowmem.memory.units import parse_bytes
from hf_lowmem.planner import plan
from hf_lowmem.planner.search.fastest import NothingFits, longest, prepare
from parts.record import RECORDS, Row, Rows, provenance, read_rows, write_rows
from parts.shapes import LLAMA_8B, TOY_SHAPE

LLAMA_3_8B: dict[str, Any] = LLAMA_8B | {"num_hidden_layers": 32, "max_position_embeddings": 8192}
LLAMA_3_1B: dict[str, Any] = LLAMA_8B | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
MODELS = {"8b": (LLAMA_3_8B, (1, 8), "budget.jsonl"), "1b": (LLAMA_3_1B, (8,), "budget_1b.jsonl")}
ASKED = ("budget", "per_device_train_batch_size", "max_length")
BUDGETS = ("16GiB", "24GiB", "48GiB", "80GiB")
TOY: dict[str, Any] = TOY_SHAPE | {"num_hidden_layers": 4, "max_position_embeddings": 256}
TOY_BUDGETS = ("601MiB", "660MiB")  # 600 of them are the context


def arguments(**settings: Any) -> LowMemSFTConfig:
    return LowMemSFTConfig(tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to="none", **settings)


def chosen(found: Any, config: LlamaConfig) -> dict[str, Any]:
    again = plan(config, found.args, dtype="bfloat16")
    return {
        "chosen": found.chosen,
        "reserved_bytes": found.plan.reserved_bytes,
        "reserved_bytes_again": again.reserved_bytes,
        "fits": again.reserved_bytes <= found.budget,
        "peak_bytes": again.peak_bytes,
        "parts": again.parts,
        "why": found.why,
        "next": found.next,
        "losses": found.losses,
        "planned": found.planned,
    }


def nothing(error: NothingFits) -> dict[str, Any]:
    return {"chosen": None, "why": str(error), "smallest": error.chosen, "reserved_bytes": error.plan.reserved_bytes}


def of_batch(config: LlamaConfig, batch: int, tokens: int, budgets: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    args = arguments(max_length=tokens, per_device_train_batch_size=batch)
    clock = time.perf_counter(), time.process_time()
    asked = prepare(config, args, dtype="bfloat16")
    shared = time.perf_counter() - clock[0], time.process_time() - clock[1]
    for budget in budgets:
        clock = time.perf_counter(), time.process_time()
        try:
            found: Any = asked.for_budget(f"budget={budget!r}", parse_bytes("budget", budget)).answer(tokens)
        except NothingFits as refused:
            found = refused
        own = time.perf_counter() - clock[0], time.process_time() - clock[1]
        yield {
            "budget": budget,
            "per_device_train_batch_size": batch,
            "max_length": tokens,
            "combinations": len(asked.found),
            "seconds": round(shared[0] + own[0], 1),
            "seconds_of_estimates": round(shared[0], 1),
            "processor_seconds": round(shared[1] + own[1], 1),
            **(nothing(found) if isinstance(found, NothingFits) else chosen(found, config)),
        }


def of_length(config: LlamaConfig, budget: str) -> dict[str, Any]:
    clock = time.perf_counter(), time.process_time()
    settings: dict[str, Any] = {"optim": "apollo_mini", "per_device_train_batch_size": 1}
    found = longest(config, arguments(**settings), budget=budget, dtype="bfloat16")
    return {
        "budget": budget,
        **settings,
        "max_length": "auto",
        "combinations": found.candidates,
        "seconds": round(time.perf_counter() - clock[0], 1),
        "processor_seconds": round(time.process_time() - clock[1], 1),
        **chosen(found, config),
        "longest": found.args.max_length,
    }


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """README's lines: what was asked, the choice, what it needs and what the nearest of those preferred would have."""
    lines = ["| budget | asked | chosen | needs | the next preferred |", "|---" * 5 + "|"]
    for row in rows:
        length = "longest sequence" if row["max_length"] == "auto" else f"{row['max_length']:,} tokens"
        asked = f"{row['per_device_train_batch_size']} × {length}" + (f", `{row['optim']}`" if "optim" in row else "")
        need = f"{row['reserved_bytes'] / 2**30:.1f} GiB"
        if row["chosen"] is None:
            lines.append(
                f"| {row['budget']} | {asked} | nothing fits; the least is {_fields(row['smallest'])} | {need} | |"
            )
            continue
        following = row["next"] and f"{row['next']['reserved_bytes'] / 2**30:.1f} GiB"
        lines.append(f"| {row['budget']} | {asked} | {_fields(row['chosen'])} | {need} | {following or ''} |")
    return lines


def _fields(values: dict[str, Any]) -> str:
    """max_grad_norm and gradient_checkpointing follow from the others, and say nothing of their own."""
    implied = {"max_grad_norm"} | ({"gradient_checkpointing"} if "lowmem_activations" in values else set())
    return " ".join(f"`{name}={value}`" for name, value in values.items() if name not in implied)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="8b", help="1b: no longest sequence")
    parser.add_argument("--budget", choices=BUDGETS, help="the rows of this budget alone, and no longest sequence")
    parser.add_argument("--batch", type=int, help="the rows of this micro-batch alone, and no longest sequence")
    parser.add_argument("--out", type=Path, help="default: the model's record")
    parser.add_argument("--toy", action="store_true", help="a tiny model; nothing is written unless --out says where")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape, batches, record = MODELS[options.model]
    config = LlamaConfig(**TOY if options.toy else shape)
    budgets, tokens = (TOY_BUDGETS, 128) if options.toy else (BUDGETS, 2048)
    some = options.budget is not None or options.batch is not None
    budgets = (options.budget,) if options.budget is not None else budgets
    batches = (options.batch,) if options.batch is not None else batches
    head = {"model": options.model} | provenance(("torch", "transformers", "trl"))
    out = options.out or (None if options.toy else RECORDS / record)
    made: Rows = list(read_rows(out)) if some and out is not None else []
    rows = (row for batch in batches for row in of_batch(config, batch, tokens, budgets))
    longest_in = TOY_BUDGETS[1] if options.toy else BUDGETS[1]
    for row in rows if some or options.model == "1b" else _and_length(rows, config, longest_in):
        row |= head | {"memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        made = replaced(made, row)
        print(row["budget"], row["per_device_train_batch_size"], row["seconds"], row["why"], "", sep="\n", flush=True)
        if out is not None:
            write_rows(out, made)
    if out is not None:
        print("\n".join(table(made)))


def replaced(rows: Rows, row: Row) -> Rows:
    """The rows with this one in the place of that which asked the same; at their end where there is none."""
    kind = [row[name] for name in ASKED]
    at = next((i for i, other in enumerate(rows) if [other.get(name) for name in ASKED] == kind), len(rows))
    return [*rows[:at], row, *rows[at + 1 :]]


def _and_length(rows: Iterator[dict[str, Any]], config: LlamaConfig, budget: str) -> Iterator[dict[str, Any]]:
    yield from rows
    yield of_length(config, budget)


if __name__ == "__main__":
    main()
