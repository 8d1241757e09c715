"""What full fine-tuning of Llama-3-8B takes, from HuggingFace's default to the least of ours: README's table.

    python scripts/bench/plan_table.py          # five minutes on one core; writes records/plan_table.jsonl
    python scripts/bench/plan_table.py --only "HF AdamW, fused"     # these rows; the record keeps the others
    python scripts/bench/plan_table.py --toy    # a tiny model, two settings; nothing is written

Every cell is the peak that `hf_lowmem.planner.plan` predicts: one sequence, all weights trained, bf16 weights,
computed with in bf16. Nothing ran on a GPU. Beside it stands what the setting costs in loss, as far as it was measured:
on small Llamas from nothing, one change at a time (`optimizers.jsonl`: stored states against fp32 ones, bf16 weights
against fp32 masters, `weights.jsonl`: int8 weights against them; `activations.jsonl`: tiers against HuggingFace's
activations). Costs of several changes were not measured together, nor one method against another.

max_position_embeddings is Llama 3.1's at every length, because Llama 3's 8,192 would end before the longest; memory
does not depend on it. What bitsandbytes' CUDA code has of temporaries is not measured, and not in its rows.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _readme_optim as measured
import embeddings as lookups
from hf_lowmem.specs import STORES_AT_REST
from parts.optimizers.report import Scores
from parts.optimizers.settings import STORE_RATE_FACTOR, Setting
from parts.record import RECORDS, Row, of_part, provenance, read_rows, write_rows
from parts.shapes import LLAMA_8B, TOY_SHAPE

RECORD = RECORDS / "plan_table.jsonl"
LENGTHS = (2048, 8192, 32768)
PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "bitsandbytes")
MODEL = LLAMA_8B | {"num_hidden_layers": 32, "max_position_embeddings": 131072}
TOY = TOY_SHAPE | {"num_hidden_layers": 2, "max_position_embeddings": 64}
NOT_MEASURED = "not measured"

# What a user changes in LowMemSFTConfig. gradient_checkpointing=True is TRL's default.
EIGHT_BIT: dict[str, Any] = {"optim": "adamw", "lowmem_state": "8bit", "lowmem_weights": "bf16_sr"}
SMALLEST = {"lowmem_activations": "checkpoint_fp8", "lowmem_step_in_backward": True, "max_grad_norm": 0}
SETTINGS: dict[str, dict[str, Any]] = {
    "HF AdamW, fused": {"optim": "adamw_torch_fused", "gradient_checkpointing": False},
    "HF AdamW, foreach, checkpointing": {"optim": "adamw_torch", "gradient_checkpointing": True},
    "HF AdamW, fused, checkpointing": {"optim": "adamw_torch_fused", "gradient_checkpointing": True},
    "HF adamw_8bit, checkpointing": {"optim": "adamw_8bit", "gradient_checkpointing": True},
    "ours: AdamW, checkpointing": EIGHT_BIT | {"gradient_checkpointing": True},
    "ours: AdamW, exact": EIGHT_BIT | {"lowmem_activations": "exact"},
    "ours: AdamW, fp8": EIGHT_BIT | {"lowmem_activations": "fp8"},
    "ours: AdamW, fp8_recompute": EIGHT_BIT | {"lowmem_activations": "fp8_recompute"},
    "ours: AdamW, checkpoint_fp8, step in backward": EIGHT_BIT | SMALLEST,
    "ours: APOLLO, checkpoint_fp8": EIGHT_BIT | {"optim": "apollo", "lowmem_activations": "checkpoint_fp8"},
    "ours: APOLLO, checkpoint_fp8, step in backward": EIGHT_BIT | SMALLEST | {"optim": "apollo"},
    "ours: APOLLO-Mini, checkpoint_fp8, step in backward": EIGHT_BIT | SMALLEST | {"optim": "apollo_mini"},
    "ours: APOLLO-Mini, scale, in backward": EIGHT_BIT
    | SMALLEST
    | {"optim": "apollo_mini", "lowmem_embeddings": "scale"},
    "ours: APOLLO-Mini, scale, int8, in backward": EIGHT_BIT
    | SMALLEST
    | {"optim": "apollo_mini", "lowmem_embeddings": "scale", "lowmem_weights": "int8_sr"},
}


def row(name: str, shape: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The plan of one cell."""
    return {"setting": name} | planned(SETTINGS[name], shape, tokens)


def planned(settings: Row, shape: Row, tokens: int, config: Any = None) -> Row:
    """A plan's figures. `config`: what the shape is made into; None: Llama's."""
    from transformers import LlamaConfig

    from hf_lowmem import LowMemSFTConfig
    from hf_lowmem.planner import plan

    with tempfile.TemporaryDirectory() as folder:
        args = LowMemSFTConfig(
            folder,
            use_cpu=True,  # transformers refuses bf16 where there is no GPU; the plan is for one all the same
            bf16=False,
            report_to="none",
            max_length=tokens,
            per_device_train_batch_size=1,
            **settings,
        )
        made = plan((config or LlamaConfig)(**shape), args, dtype="bfloat16")
    return {
        "fields": settings,
        "tokens": tokens,
        "peak_bytes": made.peak_bytes,
        "to_have_free": made.reserved_bytes,
        "host_bytes": made.host_bytes,
        "parts": made.parts,
        "peak_in": f"{made.phase}, {made.module}",
        "depths": made.depths,
        "seconds": round(made.seconds, 1),
    }


def loss_costs(settings: Row) -> str:
    """What was measured of a setting's cost: per cent of held-out loss, mean and standard error over three seeds."""
    scored = measured.scores()
    costs = []
    costs.append("weights {:+.2f} ± {:.2f}".format(*_of_store(scored, settings.get("lowmem_weights", "keep"))))
    if "lowmem_state" in settings:
        method = settings["optim"]
        found = measured.difference(scored, Setting(method, settings["lowmem_state"]), Setting(method))
        said = "states {:+.2f} ± {:.2f}".format(*found)
        if (rule := settings.get("lowmem_embeddings")) is not None:
            apart = lookups.against_adam(read_rows(lookups.RECORD), f"{method}, {rule}")
            said += f"; `{rule}` {apart or NOT_MEASURED}"
        costs.append(said)
    elif settings["optim"] == "adamw_8bit":
        costs.append(f"states {NOT_MEASURED}")
    if settings["optim"].startswith("apollo"):
        costs.append(f"method {NOT_MEASURED}")
    tier = settings.get("lowmem_activations")
    if tier is not None:
        rows = of_part(read_rows(RECORDS / "activations.jsonl"), "loss")
        ours, theirs = (
            {r["seed"]: r["heldout_loss"] for r in rows if r["way"] == way} for way in (tier, "HuggingFace")
        )
        costs.append(f"activations {statistics.fmean(100 * (ours[s] / theirs[s] - 1) for s in theirs):+.2f}")
    return ", ".join(costs)


def _of_store(scored: Scores, store: str) -> tuple[float, float]:
    """AdamW's loss with a store of weights against fp32 masters; of stores at rest `weights.jsonl` has it."""
    if store not in STORES_AT_REST:
        masters, stored = (Setting("adamw", weights=w, rate_factor=STORE_RATE_FACTOR) for w in ("masters", store))
        return measured.difference(scored, stored, masters)
    rows = [r for r in read_rows(RECORDS / "weights.jsonl") if (r["kind"], r["method"]) == ("nothing", "adamw")]
    found, theirs = ({r["seed"]: r["heldout_loss"] for r in rows if r["store"] == w} for w in (store, "masters"))
    assert len(found) == 3, store
    gaps = [100 * (found[seed] / theirs[seed] - 1) for seed in theirs]
    return statistics.fmean(gaps), statistics.stdev(gaps) / len(gaps) ** 0.5


def fields(settings: Row) -> str:
    return " ".join(f"`{name}={value}`" for name, value in settings.items())


def markdown(rows: Sequence[dict[str, Any]]) -> list[str]:
    """README's lines: a setting, its peak at every length in GiB, its fields, what is known of its loss."""
    lengths = sorted({row["tokens"] for row in rows})
    lines = [
        "| | " + " | ".join(f"{tokens:,} tokens" for tokens in lengths) + " | fields | loss, % |",
        "|---" * (len(lengths) + 3) + "|",
    ]
    for name in dict.fromkeys(row["setting"] for row in rows):
        peaks = {row["tokens"]: row["peak_bytes"] / 2**30 for row in rows if row["setting"] == name}
        settings = next(row["fields"] for row in rows if row["setting"] == name)
        cells = [name, *(f"{peaks[tokens]:.1f} GiB" for tokens in lengths), fields(settings), loss_costs(settings)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="a tiny model, two settings, one length; nothing is written")
    parser.add_argument(
        "--only", nargs="+", choices=SETTINGS, metavar="SETTING", help="settings to plan: " + "; ".join(SETTINGS)
    )
    parser.add_argument("--record", type=Path, default=None, help=f"default: {RECORD.relative_to(RECORDS.parent)}")
    options = parser.parse_args(arguments)
    common = {
        "command": "python scripts/bench/plan_table.py",
        **provenance(PACKAGES),
    }
    names = options.only or ([*SETTINGS][:: len(SETTINGS) - 1] if options.toy else [*SETTINGS])
    path = options.record or (None if options.toy else RECORD)
    kept = read_rows(path) if options.only and path is not None else []
    rows: list[dict[str, Any]] = [row for row in kept if row["setting"] not in names]
    for name in names:
        for tokens in (32,) if options.toy else LENGTHS:
            rows.append(row(name, TOY if options.toy else MODEL, tokens) | common)
            print(f"{name:<52} {tokens:>6} tokens {rows[-1]['peak_bytes'] / 2**30:8.2f} GiB", file=sys.stderr)
            if path is not None:
                write_rows(path, sorted(rows, key=lambda row: [*SETTINGS].index(row["setting"])))
    print("\n".join(markdown(read_rows(path) if path is not None else rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
