"""Facts of a run before it starts. Plain values only, and none that shows a folder of the machine or a token, because
a card may be public.
"""

import dataclasses
import math
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sized
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import hf_lowmem

__all__ = ["PACKAGES", "commit_of", "describe", "device_name", "plain", "public_name", "settings_of", "versions_of"]

PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "bitsandbytes", "triton")

# Given whether or not they differ from the config's default: what a reader asks for first.
ALWAYS = (
    "optim",
    "learning_rate",
    "lr_scheduler_type",
    "weight_decay",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    "num_train_epochs",
    "max_length",
    "gradient_checkpointing",
    "bf16",
    "fp16",
    "loss_type",
    "seed",
    "data_seed",
)
# Of the machine, the account or the reporting, not of the training.
LEFT_OUT = re.compile(
    r"output_dir|logging_.*|run_name|report_to|disable_tqdm|push_to_hub.*|hub_.*|trackio_.*|project|log_level.*"
    r"|log_on_each_node|overwrite_output_dir|resume_from_checkpoint|local_rank|ddp_backend|restore_callback_.*"
)
# Names that `load_dataset` gives to files and generators.
NAMELESS = {"json", "csv", "parquet", "text", "arrow", "generator", "pandas", "xml", "webdataset"}
_HUB_DATA = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)@")
_SNAPSHOT = re.compile(r"models--(.+?)--(.+?)/snapshots/")


def describe(args: Any, *, model: Any, dataset: Any, trainer: str | None) -> dict[str, Any]:
    """The facts that a report begins with; None for what cannot be found out.

    args: TrainingArguments or one of its kind. model, dataset: what is trained, and on what. trainer: its class's name
    """
    return {
        "run": Path(args.output_dir).resolve().name,
        "trainer": trainer,
        "config": type(args).__name__,
        "model": _model(model),
        "dataset": {"name": dataset_name(dataset), "rows": len(dataset) if isinstance(dataset, Sized) else None},
        "settings": settings_of(args),
        "device": device_name(args.device),
        "processes": args.world_size,
        "versions": versions_of(PACKAGES),
    }


def settings_of(args: Any) -> dict[str, Any]:
    """The fields that differ from their defaults, and those of `ALWAYS`."""
    found = {}
    for field in dataclasses.fields(args):
        if not field.init or LEFT_OUT.fullmatch(field.name):
            continue
        default = field.default_factory() if callable(field.default_factory) else field.default
        value = plain(getattr(args, field.name))
        if value is not None and (field.name in ALWAYS or value != plain(default)) and value not in ({}, []):
            found[field.name] = value
    return found


def plain(value: Any) -> Any:
    """A value for JSON: an enum's own, "nan" or "inf" as text, a folder's name without its path; None for objects."""
    if isinstance(value, Enum):
        value = value.value
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return public_name(value) if Path(value).is_absolute() else value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, set | frozenset):
        return sorted(plain(v) for v in value)
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def public_name(model: str) -> str:
    """A name on the hub as it is; a folder's own name without this machine's path to it."""
    if (cached := _SNAPSHOT.search(model)) is not None:
        return f"{cached[1]}/{cached[2]}"
    path = Path(model)
    return path.resolve().name if path.is_absolute() or path.is_dir() else model


def dataset_name(dataset: Any) -> str | None:
    """Name of a data set on the hub; None for files and for data made in memory."""
    info = getattr(dataset, "info", None)
    sources = getattr(info, "download_checksums", None) or {}
    if isinstance(sources, Mapping) and (found := next(filter(None, map(_HUB_DATA.match, sources)), None)) is not None:
        return found[1]
    names = (getattr(info, "dataset_name", None), getattr(info, "builder_name", None))
    return next((name for name in names if isinstance(name, str) and name not in NAMELESS), None)


def device_name(device: torch.device | None = None) -> str:
    """The GPU's name, or the kind of processor with its number of threads. None: the GPU, where there is one."""
    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        return torch.cuda.get_device_name(device)
    if device is not None and device.type not in ("cpu", "cuda"):
        return device.type
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Python's, ours, and those of `packages` that are installed."""
    found = {"python": platform.python_version(), "hf-lowmem": hf_lowmem.__version__}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def commit_of(root: Path, *, but: str | None = None) -> str | None:
    """Commit of the clone at `root`, marked where its files differ from it; None where there is no clone.

    Args:
        root: the clone's top folder. One inside somebody else's repository is no clone.
        but: a folder under it whose files do not count, such as one that runs write their records to.
    """

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root.resolve():
            return None
        changes = git("status", "--porcelain", "--", ".", *([f":(exclude){but}"] if but else []))
        return git("rev-parse", "HEAD") + (" with changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _model(model: Any) -> dict[str, Any]:
    if not isinstance(model, torch.nn.Module):
        return {}
    config: Any = getattr(model, "config", None)
    parameters = list(model.parameters())
    adapters = {
        name: {k: v for k, v in plain(adapter.to_dict()).items() if v not in (None, False, {}, [])}
        for name, adapter in getattr(model, "peft_config", {}).items()
    }
    sizes: dict[torch.dtype, int] = {}
    for p in parameters:
        sizes[p.dtype] = sizes.get(p.dtype, 0) + p.numel()
    return {
        "name": public_name(name) if (name := getattr(config, "_name_or_path", None)) else None,
        "folder": bool(name) and _SNAPSHOT.search(name) is None and Path(name).is_dir(),  # and so not on the hub
        "type": getattr(config, "model_type", None),
        "parameters": sum(sizes.values()),
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
        "dtype": plain(max(sizes, key=sizes.__getitem__)) if sizes else None,  # of most of them
        "adapters": adapters,
        "quantized": bool(getattr(model, "is_quantized", False)),
        "config": plain(config.to_diff_dict()) if hasattr(config, "to_diff_dict") else None,
    }
