"""The longest sequences on one card: what full fine-tuning of Llama-3-8B takes from 131,072 to 1,048,576 tokens; and
what a small model really takes of a CPU at 131,072.

    python scripts/bench/long_sequences.py                # plans: twenty minutes on one core
    python scripts/bench/long_sequences.py --part auto    # the longest that fits in 80 GB: ten minutes of CPU
    python scripts/bench/long_sequences.py --part real    # a real step on the CPU: ten minutes, 5 GiB
    python scripts/bench/long_sequences.py --part time    # a step's time beside checkpointing's: ten minutes
    python scripts/bench/long_sequences.py --toy          # a tiny model, short sequences; nothing is written

Each part writes its own rows of records/long_sequences.jsonl, `--setting NAME` those of one setting.

plan  Every row is what `hf_lowmem.planner.plan` predicts for a CUDA device, as in plan_table.py: nothing ran on one.
      One sequence of one document, all weights trained in bf16, `apollo_mini` in 8-bit states, step in backward.
auto  What `hf-lowmem plan --budget 74.5GiB --max_length auto` answers: the longest sequence, a multiple of 64, of which
      a step is planned to fit in a card of 80 GB.
real  One step of LowMemSFTTrainer on the CPU in fp32: what torch's allocator gave out at most beside what was planned,
      and the process's own peak. Of HuggingFace's checkpointing the long step is planned only, and the plan is compared
      with a step that is short enough to run.
time  Forward and backward pass at 16,384 tokens, in turns with HuggingFace's checkpointing, by process time.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from parts.record import RECORDS, Row, Rows, of_part, provenance, read_rows, write_rows
from parts.streams import real, times
from plan_table import EIGHT_BIT, MODEL, PACKAGES, TOY, planned

RECORD = RECORDS / "long_sequences.jsonl"
OURS = EIGHT_BIT | {"optim": "apollo_mini", "lowmem_step_in_backward": True, "max_grad_norm": 0}
HOST = {"lowmem_offload": "inputs"}
SETTINGS: dict[str, tuple[Row, tuple[int, ...]]] = {
    # setting: what is set beside, and numbers of tokens
    "HF checkpointing": ({"gradient_checkpointing": True}, (131072,)),
    "`checkpoint_fp8`": ({"lowmem_activations": "checkpoint_fp8"}, (131072,)),
    "`stream_fp8`": ({"lowmem_activations": "stream_fp8"}, (131072, 262144, 524288)),
    "`stream_fp8/4`": ({"lowmem_activations": "stream_fp8/4"}, (524288,)),
    "`stream_fp8`, `lowmem_offload=inputs`": (
        {"lowmem_activations": "stream_fp8"} | HOST,
        (131072, 262144, 524288, 1048576),
    ),
    "the same, `lowmem_embeddings=scale`": (
        {"lowmem_activations": "stream_fp8", "lowmem_embeddings": "scale"} | HOST,
        (524288, 1048576),
    ),
}
BUDGET = "74.5GiB"
FARTHEST = 2**21  # positions of the model that is asked for its longest sequence
AUTO: dict[str, Row] = {
    "`stream_fp8`": {"lowmem_activations": "stream_fp8"},
    "`stream_fp8`, `lowmem_offload=inputs`": {"lowmem_activations": "stream_fp8"} | HOST,
}
REAL: dict[str, tuple[Row, tuple[int, ...]]] = {
    # setting: what is set, and numbers of tokens, of which the last is the longest that is run
    "HF checkpointing": ({"gradient_checkpointing": True}, (131072, 8192)),
    "`stream_fp8`": ({"lowmem_activations": "stream_fp8"}, (131072,)),
}
PARTS = ("plan", "auto", "real", "time")


def made(part: str, toy: bool, only: str | None) -> Iterator[Row]:
    """The rows of one part, or of one setting of it."""
    settings = SETTINGS if part == "plan" else REAL
    if part == "time":
        yield from times.rows(256 if toy else 16384, 1 if toy else 3)
        return
    if part == "auto":
        for name, beside in AUTO.items():
            if only in (None, name):
                yield {"setting": name} | longest(OURS | beside, toy)
        return
    for name, (beside, lengths) in settings.items():
        for tokens in lengths if only in (None, name) else ():
            if part == "plan":
                shape = TOY if toy else MODEL | {"max_position_embeddings": tokens}
                yield {"setting": name} | planned(OURS | beside, shape, 64 if toy else tokens)
            else:
                yield {"setting": name} | weighed(beside, toy, tokens, runs=tokens <= lengths[-1])
            if toy:
                break


def longest(settings: Row, toy: bool) -> Row:
    """A row of `auto`: what the command answers."""
    from transformers import LlamaConfig

    from hf_lowmem.cli.main import main as hf_lowmem

    budget, positions = ("2GiB", 192) if toy else (BUDGET, FARTHEST)
    shape: Row = (TOY if toy else MODEL) | {"max_position_embeddings": positions}
    given = settings | {"per_device_train_batch_size": 1, "bf16": False, "dtype": "bfloat16"}
    flags = [f"--{name}={value}" for name, value in given.items()]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as out:
        LlamaConfig(**shape).save_pretrained(folder)
        status = hf_lowmem(["plan", "--model", folder, "--budget", budget, "--max_length", "auto", *flags, "--json"])
    if status:
        raise SystemExit(status)
    made = json.loads(out.getvalue())
    said = {"tokens": made["max_length"], "peak_bytes": made["peak_bytes"], "to_have_free": made["reserved_bytes"]}
    said |= {"chosen": made["chosen"], "host_bytes": made["host_bytes"], "seconds": round(made["seconds"], 1)}
    return {"fields": settings, "budget": budget, "asked": " ".join(["--max_length auto", *flags])} | said


def weighed(settings: Row, toy: bool, tokens: int, runs: bool) -> Row:
    """A row of `real`. `runs`: whether the step is trained, and not planned only."""
    shape, tokens = (real.TOY, 512) if toy else (real.MODEL, tokens)
    row = {"fields": settings, "tokens": tokens, "model": shape} | real.planned(settings, shape, tokens)
    return row | (real.apart(settings, shape, tokens) if runs else {})


def table(rows: Rows) -> list[str]:
    """README's lines: a setting, and at each length GiB to have free on the device, and on the host beside it."""
    rows = of_part(rows, "plan")
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


def table_of_auto(rows: Rows) -> list[str]:
    """README's lines: the longest sequence in a budget, and what it takes."""
    lines = ["| | longest sequence | to have free |", "|---|---|---|"]
    for row in of_part(rows, "auto"):
        cells = [row["setting"], f"{row['tokens']:,} tokens", _cell(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def table_of_real(rows: Rows) -> list[str]:
    """README's lines: a real step's peak as planned and as measured."""
    lines = ["| | tokens | planned | measured | of the process | CPU time |", "|---|---|---|---|---|---|"]
    for row in of_part(rows, "real"):
        ran = "peak_bytes" in row
        measured = (f"{row[name] / 2**30:.2f} GiB" if ran else "" for name in ("peak_bytes", "process_bytes"))
        seconds = f"{row['cpu_seconds']:,.0f} s" if ran else "not run"
        cells = [row["setting"], f"{row['tokens']:,}", f"{row['planned_bytes'] / 2**30:.2f} GiB", *measured, seconds]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def said(row: Row) -> str:
    """A row in a line, while the others are made."""
    if row["part"] in ("plan", "auto"):
        return f"{row['setting']} {row['tokens']} {_cell(row)}"
    names = ("tokens", "planned_bytes", "peak_bytes", "process_bytes", "cpu_seconds", "seconds", "ratio")
    return " ".join([row["setting"], *(f"{name}={row[name]}" for name in names if name in row)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, default="plan")
    parser.add_argument("--setting", default=None, help="of plan and real: this one alone")
    parser.add_argument("--toy", action="store_true", help="a tiny model, one length a setting; nothing is written")
    parser.add_argument("--record", type=Path, default=None, help=f"default: {RECORD.relative_to(RECORDS.parent)}")
    options = parser.parse_args(arguments)
    flag = "" if options.part == "plan" else f" --part {options.part}"
    common = {"command": f"python scripts/bench/long_sequences.py{flag}", **provenance(PACKAGES)}
    rows = []
    for row in made(options.part, options.toy, options.setting):
        rows.append({"part": options.part} | row | common)
        print(said(rows[-1]), flush=True)
    path = options.record or (None if options.toy else RECORD)
    if path is not None:
        anew = {(row["part"], row["setting"]) for row in rows}
        kept = [row for row in read_rows(path) if (row["part"], row["setting"]) not in anew]
        order = [(part, name) for part in PARTS for name in (*SETTINGS, *times.TIERS)]
        rows = sorted([*kept, *rows], key=lambda row: order.index((row["part"], row["setting"])))
        write_rows(path, rows)
    tables = {"real": table_of_real, "auto": table_of_auto}
    print("\n".join(tables.get(options.part, table)(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
