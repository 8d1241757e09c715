"""Layers in host memory: what a step of `mezo` takes of a device and of the host, for OPT-13B and OPT-66B.

    python scripts/bench/zeroth_offload.py          # half an hour of one core; writes records/zeroth_offload.jsonl
    python scripts/bench/zeroth_offload.py --toy    # a tiny model; nothing is written

The models and the sequence of 2,048 tokens are those of ZO2 (arXiv 2503.12668), which reports 6.18 and 12.07 GB for
them on a GPU, in fp16. Every row is what `hf_lowmem.planner.plan` predicts for a CUDA device in bf16: nothing ran on
one. The weights are in no place where they would have to fit: a plan has none.
"""

import argparse
from collections.abc import Sequence

from transformers import OPTConfig

from parts.record import RECORDS, Row, provenance, read_rows, write_rows
from plan_table import PACKAGES, planned

RECORD = RECORDS / "zeroth_offload.jsonl"
OPT = {"vocab_size": 50272, "max_position_embeddings": 2048}
MODELS: dict[str, tuple[Row, float]] = {
    # name: hidden size, layers and heads; GB that ZO2's authors report
    "OPT-13B": ({"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40}, 6.18),
    "OPT-66B": ({"hidden_size": 9216, "num_hidden_layers": 64, "num_attention_heads": 72}, 12.07),
}
TOY: dict[str, tuple[Row, float]] = {
    "toy": ({"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 128}, 1.0)
}
SETTINGS: Row = {
    "optim": "mezo",
    "lowmem_weights": "bf16_sr",
    "max_grad_norm": 0,
    "lr_scheduler_type": "constant",
    "lowmem_offload": "weights",
}


def shape_of(sizes: Row) -> Row:
    """What OPT's config is made of."""
    width = sizes["hidden_size"]
    return OPT | {"ffn_dim": 4 * width, "word_embed_proj_dim": width} | sizes


def rows(models: dict[str, tuple[Row, float]], tokens: int, only: str | None) -> list[Row]:
    """A row of each model."""
    made: list[Row] = []
    for name, (sizes, theirs) in models.items():
        if only in (None, name):
            made.append({"model": name, "zo2_gb": theirs} | planned(SETTINGS, shape_of(sizes), tokens, OPTConfig))
            print(line(made[-1]), flush=True)
    return made


def line(row: Row) -> str:
    """A row of README's table. GB as the paper's: thousands of millions."""
    ours = (f"{row[name] / 1e9:.2f}" for name in ("peak_bytes", "to_have_free", "host_bytes"))
    return f"| {' | '.join([row['model'], *ours, str(row['zo2_gb'])])} |"


def table(found: Sequence[Row]) -> list[str]:
    """README's lines."""
    head = "| | at the peak, GB | to have free, GB | host memory, GB | ZO2's authors, GB |"
    return [head, "|---" * 5 + "|", *map(line, found)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default=None, help="this one alone")
    parser.add_argument("--toy", action="store_true", help="a tiny model; nothing is written")
    options = parser.parse_args(arguments)
    if options.toy:
        rows(TOY, 16, None)
        return 0
    common = {"command": "python scripts/bench/zeroth_offload.py", **provenance(PACKAGES)}
    made = [row | common for row in rows(MODELS, 2048, options.model)]
    kept = [row for row in read_rows(RECORD) if row["model"] not in {row["model"] for row in made}]
    write_rows(RECORD, sorted([*kept, *made], key=lambda row: list(MODELS).index(row["model"])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
