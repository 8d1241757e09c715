"""Average a run's checkpoints, each by its metric: metrics-weighted averaging, arXiv 2504.18580.

    python scripts/merge_checkpoints.py RUN/checkpoint-100 RUN/checkpoint-200 RUN/checkpoint-300 --output MERGED

Weights of the model in the last checkpoint's folder become the mean of all, in which a checkpoint counts in proportion
to a power of its metric: loss^-penalty for a loss, metric^penalty for a larger-is-better one, step^penalty for `step`.
With --penalty 0 all count alike. The metric is what trainer_state.json says last, up to the checkpoint's own step. The
paper weighs by training loss or by step, with one penalty factor; these powers are this script's reading of it.

Tensors are added in fp64, one at a time, whatever the size of the model, and written as they were (dtype, names,
files). MERGED is a model's folder that loads like any other, with a merge.json that says what was merged.

Not for adapters: the mean of two factors is not the factor of a mean, so they are refused; PEFT's
`add_weighted_adapter(..., combination_type="cat")` is exact. And not for checkpoints of different runs, or from a rate
that is still high: what lies between two points far apart need not be good. Try the merged model on held-out data
beside the last checkpoint; quality was not measured here.
"""

import argparse
import json
import math
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_lowmem.checkpoints import verify

STATE, MERGE = "trainer_state.json", "merge.json"
# Of a checkpoint, what belongs to the training and not to the model.
OF_THE_RUN = (
    "optimizer.*",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*",
    "training_args.bin",
    STATE,
    "lowmem_*",
    "README.md",
)


def metric_of(folder: Path, metric: str) -> float:
    """The metric of a checkpoint; raises ValueError where it has none, or one that is not above zero."""
    file = folder / STATE
    if not file.is_file():
        raise ValueError(f"{folder}: there is no {STATE}. Give folders that a Trainer has saved, named checkpoint-N.")
    state: dict[str, object] = json.loads(file.read_text(encoding="utf-8"))
    step, history = state["global_step"], state["log_history"]
    assert isinstance(step, int)
    assert isinstance(history, list)
    found = [row[metric] for row in history if metric in row and row["step"] <= step]
    value = float(step if metric == "step" else found[-1] if found else math.nan)
    if not (math.isfinite(value) and value > 0):
        known = sorted({name for row in history for name in row} - {"step"})
        raise ValueError(
            f"{folder}: --metric {metric} is {'not there' if math.isnan(value) else value} by step {step}, and must be "
            f"a number above zero. Choose from: step, {', '.join(known)}."
        )
    return value


def shares(metrics: Sequence[float], penalty: float, *, larger: bool) -> list[float]:
    """Share of each checkpoint in the mean. Their sum is 1."""
    best = max(metrics) if larger else min(metrics)
    powers = [(value / best) ** (penalty if larger else -penalty) for value in metrics]
    return [power / sum(powers) for power in powers]


def mean(tensors: Sequence[Tensor], parts: Sequence[float], name: str) -> Tensor:
    """The mean of one tensor of several checkpoints; what is no float must be equal in all."""
    first = tensors[0]
    if any((t.shape, t.dtype) != (first.shape, first.dtype) for t in tensors):
        sizes = ", ".join(sorted({f"{tuple(t.shape)} {t.dtype}" for t in tensors}))
        raise ValueError(f"{name} is {sizes} in different checkpoints. Merge checkpoints of one run.")
    if not first.is_floating_point():
        if not all(torch.equal(t, first) for t in tensors):
            raise ValueError(f"{name} is {first.dtype}, of which there is no mean. Merge plain models.")
        return first
    total = torch.zeros(first.shape, dtype=torch.float64)
    for tensor, part in zip(tensors, parts, strict=True):
        total.add_(tensor.double(), alpha=part)
    return total.to(first.dtype)


def files_by_name(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a model; raises ValueError where there is no plain model."""
    if (folder / "adapter_model.safetensors").exists():
        raise ValueError(
            f"{folder} holds an adapter, whose factors have no mean. Use PEFT's add_weighted_adapter(..., "
            "combination_type='cat'), which is exact."
        )
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    if not found:
        raise ValueError(f"{folder}: there is no model*.safetensors. Give checkpoints of a whole model.")
    return found


def merge(folders: Sequence[Path], parts: Sequence[float], output: Path) -> None:
    """Write the mean of models into a new folder, which has the last one's files."""
    places, last = [files_by_name(folder) for folder in folders], folders[-1]
    for folder, names in zip(folders, places, strict=True):
        if odd := sorted(names.keys() ^ places[-1].keys()):
            raise ValueError(f"{folder} and {last} differ in {odd[0]}. Merge checkpoints of one run.")
    shutil.copytree(last, output, ignore=shutil.ignore_patterns(*OF_THE_RUN, "model*.safetensors", "global_step*"))
    with ExitStack() as stack:
        opened = {path: stack.enter_context(safe_open(path, "pt")) for names in places for path in set(names.values())}
        for path in sorted(set(places[-1].values())):
            made = {
                name: mean([opened[names[name]].get_tensor(name) for names in places], parts, name)
                for name, file in places[-1].items()
                if file == path
            }
            save_file(made, output / path.name, metadata=opened[path].metadata())


def main(arguments: Sequence[str] | None = None) -> int:
    """Merge what the command line names; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="folders of one run")
    parser.add_argument("--output", type=Path, required=True, help="a folder that there is not yet")
    parser.add_argument("--metric", default="eval_loss", help="a key of the log, or step; default: eval_loss")
    parser.add_argument("--penalty", type=float, default=1.0, help="the power of the metric; 0: a plain mean")
    parser.add_argument("--greater_is_better", action="store_true", help="of the metric; of step it always is")
    asked = parser.parse_args(arguments)
    try:
        if len(asked.checkpoints) < 2:
            raise ValueError(f"{asked.checkpoints[0]} alone is its own mean. Give two checkpoints or more.")
        if asked.output.exists():
            raise ValueError(f"--output {asked.output} is there already. Name a new folder.")
        if not math.isfinite(asked.penalty) or asked.penalty < 0:
            raise ValueError(f"--penalty {asked.penalty}: expected a number of at least 0.")
        for folder in asked.checkpoints:
            verify(folder)
        metrics = [metric_of(folder, asked.metric) for folder in asked.checkpoints]
        parts = shares(metrics, asked.penalty, larger=asked.greater_is_better or asked.metric == "step")
        merge(asked.checkpoints, parts, asked.output)
    except (ValueError, OSError) as error:
        print(f"merge_checkpoints: {error}", file=sys.stderr)
        return 2
    rows = [
        {"checkpoint": folder.name, asked.metric: value, "share": part}
        for folder, value, part in zip(asked.checkpoints, metrics, parts, strict=True)
    ]
    (asked.output / MERGE).write_text(json.dumps({"penalty": asked.penalty, "merged": rows}, indent=1) + "\n")
    for row in rows:
        print(f"{row['checkpoint']}: {asked.metric} {row[asked.metric]:.4g}, {row['share']:.1%}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
