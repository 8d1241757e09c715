"""The longest sequences on one card: what full fine-tuning of Llama-3-8B takes from 131,072 to 1,048,576 tokens.

    python scripts/bench/long_sequences.py          # five minutes on one core; writes records/long_sequences.jsonl
    python scripts/bench/long_sequences.py --toy    # a tiny model, short sequences; nothing is written

Every row is what `hf_lowmem.planner.plan` predicts for a CUDA device, as in plan_table.py: nothing ran on one. One
sequence of one document, all weights trained in bf16, `apollo_mini` in 8-bit states, step in backward.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from parts.record import RECORDS, Row, Rows, provenance, write_rows
from plan_table import EIGHT_BIT, MODEL, PACKAGES, TOY, planned

RECORD = RECORDS / "long_sequences.jsonl"
OURS = EIGHT_BIT | {"optim": "apollo_mini", "lowmem_step_in_backward": True, "max_grad_norm": 0}
HOST = {"lowmem_offload": "inputs"}
SETTINGS: dict[str, tuple[Row, tuple[int, ...]]] = {
    # setting: what is set beside, and numbers of tokens
    "HF checkpointing": ({"gradient_checkpointing": True}, (131072,)),
    "`checkpoint_fp8`": ({"lowmem_activations": "checkpoint_fp8"}, (131072,)),
    "`stream_fp8`": ({"lowmem_activations": "stream_fp8"}, (131072, 262144, 524288)),
    "`stream_fp8`, `lowmem_offload=inputs`": (
        {"lowmem_activations": "stream_fp8"} | HOST,
        (131072, 262144, 524288, 1048576),
    ),
    "the same, `lowmem_embeddings=scale`": (
        {"lowmem_activations": "stream_fp8", "lowmem_embeddings": "scale"} | HOST,
        (524288, 1048576),
    ),
}


def made(toy: bool) -> Iterator[Row]:
    for name, (beside, lengths) in SETTINGS.items():
        for tokens in lengths:
            shape = TOY if toy else MODEL | {"max_position_embeddings": tokens}
            yield {"setting": name} | planned(OURS | beside, shape, 64 if toy else tokens)
            if toy:
                break


def table(rows: Rows) -> list[str]:
    """README's lines: a setting, and at each length GiB to have free on the device, and on the host beside it."""
    lengths = sorted({row["tokens"] for row in rows})
    lines = ["| | " + " | ".join(f"{tokens:,} tokens" for tokens in lengths) + " |", "|---" * (len(lengths) + 1) + "|"]
    for name in dict.fromkeys(row["setting"] for row in rows):
        found = {row["tokens"]: row for row in rows if row["setting"] == name}
        lines.append("| " + " | ".join([name, *(_cell(found.get(tokens)) for tokens in lengths)]) + " |")
    return lines


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    host = f" + {row['host_bytes'] / 2**30:.0f} of the host" if row["host_bytes"] else ""
    return f"{row['to_have_free'] / 2**30:.1f} GiB{host}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="a tiny model, one length a setting; nothing is written")
    parser.add_argument("--record", type=Path, default=None, help=f"default: {RECORD.relative_to(RECORDS.parent)}")
    options = parser.parse_args(arguments)
    common = {"command": "python scripts/bench/long_sequences.py", **provenance(PACKAGES)}
    rows = []
    for row in made(options.toy):
        rows.append(row | common)
        print(row["setting"], row["tokens"], _cell(row), flush=True)
    path = options.record or (None if options.toy else RECORD)
    if path is not None:
        write_rows(path, rows)
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
