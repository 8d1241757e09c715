"""What a record of gpu_once.py says about the planner: predicted beside measured peaks, and its constants."""

import statistics
import tempfile
from collections.abc import Iterator

from hf_lowmem.planner import Plan, plan
from hf_lowmem.planner.search import cost
from parts.gpu.training import WHOLE
from parts.record import Row, Rows
from parts.shapes import LLAMA_8B, TOY_SHAPE
from parts.tables import markdown

GIB = 2**30


def planned(row: Row) -> Plan:
    """The plan of a row of step whole. Raises ValueError where the planner has no such training."""
    import torch
    from transformers import LlamaConfig

    from hf_lowmem import LowMemSFTConfig

    if "trl" not in row["head"]:
        raise ValueError(f"the run had HuggingFace's head ({row['head']}); what is planned is TRL's, without logits")
    layers, tokens = (int(part.split()[-2].replace(",", "")) for part in row["case"].split(","))
    spec = WHOLE[row["way"]]
    fields: Row = {"gradient_checkpointing": False, "max_grad_norm": 0.0} | spec["fields"]
    fields |= {f"lowmem_{name}": value for name, value in spec.get("ours", {}).items() if name != "name"}
    sizes = TOY_SHAPE if row["toy"] else LLAMA_8B
    sizes = sizes | {"num_hidden_layers": layers, "max_position_embeddings": max(tokens, 128), "use_cache": False}
    with tempfile.TemporaryDirectory() as folder:
        args = LowMemSFTConfig(
            folder, max_length=tokens, per_device_train_batch_size=1, bf16=False, report_to="none", **fields
        )
        return plan(LlamaConfig(**sizes), args, dtype=torch.bfloat16)


def peaks(rows: Rows) -> str:
    """Table of predicted and measured peaks of whole steps; why there is none, where there is none."""
    lines: list[list[str]] = []
    for row in rows:
        if row["step"] != "whole" or not row.get("peak"):
            continue
        try:
            made = planned(row)
        except ValueError as error:
            lines.append([row["way"], "", f"{row['peak'] / GIB:.2f}", str(error)])
            continue
        off = f"{100 * (made.peak_bytes / row['peak'] - 1):+.1f} %"
        lines.append([row["way"], f"{made.peak_bytes / GIB:.2f}", f"{row['peak'] / GIB:.2f}", off])
    if not lines:
        return "Predicted peaks: the record has no whole step that ran on a CUDA device.\n"
    heads = ["whole step", "predicted, GiB", "measured, GiB", "difference"]
    return "Predicted and measured peaks\n\n" + markdown(heads, lines)


def constants(rows: Rows) -> str:
    """Table of what the planner assumes of a device, and what this one showed."""
    lines = list(_constants(rows))
    if not lines:
        return "The planner's constants: the record has nothing to set them by.\n"
    return "The planner's constants\n\n" + markdown(["constant", "assumed", "measured", "from"], lines)


def _constants(rows: Rows) -> Iterator[list[str]]:
    roof = {row["case"]: row for row in rows if row["step"] == "roof" and "error" not in row}
    bandwidth = roof.get("copy", {}).get("bandwidth")
    flops = roof.get("bf16 product", {}).get("flops")
    if bandwidth and flops:
        yield ["cost.RATIO", str(cost.RATIO), f"{flops / bandwidth:.0f}", "step roof: product over copy"]
    update = next((r for r in rows if r.get("setting") == "adamw 8bit, bf16_sr" and "seconds" in r), None)
    if update and bandwidth and flops:
        beside = max(0.0, update["seconds"] - update["moved"] / bandwidth)
        operations = 2 * update["parameters"] * cost.CODEC_WORK_OTHERS
        what = "step optimizer: time beyond its bytes, an operation of its two codecs"
        yield ["cost.VECTOR", str(cost.VECTOR), f"{beside * flops / operations:.1f}", what]
    layers = [r for r in rows if r["step"] == "layers" and r["way"] == "fp8" and "seconds" in r]
    if len(layers) == 2:
        four, one = sorted(layers, key=lambda r: -r["seconds"])
        ratio, tokens = four["seconds"] / one["seconds"], int(one["case"].split()[-2])
        found = f"{tokens * (4 - ratio) / (ratio - 1):.0f}" if ratio > 1 else "no slope"
        yield ["cost.MICRO_BATCH", str(cost.MICRO_BATCH), found, "step layers: one row of tokens beside four"]
    held = [r["reserved"] / r["peak"] for r in rows if r.get("reserved") and r.get("peak")]
    if held:
        shown = f"{statistics.median(held):.3f}, at most {max(held):.3f}"
        yield ["reserved over allocated", "by rounding alone", shown, f"{len(held)} peaks of layers and whole steps"]
