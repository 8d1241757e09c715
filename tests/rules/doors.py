"""Every door, as a function that is told what a run is like and lets the door refuse it.

What a run is like is said in the words of `Run`; each door puts it where a user would: a field, a YAML, an Accelerator.
"""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate import ParallelismConfig
from accelerate.utils import DistributedType
from datasets import Dataset
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import LlamaConfig, TrainingArguments

from hf_lowmem import (
    LowMemCallback,
    LowMemSFTConfig,
    LowMemSFTTrainer,
    LowMemTrainer,
    LowMemTrainingArguments,
)
from hf_lowmem.cli.launch import prepare
from hf_lowmem.planner import plan
from hf_lowmem.training import section
from hf_lowmem.training.plugin import LowMemPlugin
from tests.conftest import tiny_llama, word_tokenizer

COMMON: dict[str, Any] = {"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": "none"}
INTEGRATIONS = Path(__file__).parents[2] / "integrations"
ENGINES = {"fsdp": "FSDP", "deepspeed": "DEEPSPEED", "ddp": "MULTI_GPU", "single": "NO"}
OURS = {
    "optim": "optim",
    "tiers": "lowmem_activations",
    "stochastic": "lowmem_activations_stochastic",
    "host": "lowmem_offload",
    "chunk": "lowmem_stream_chunk",
    "matmul": "lowmem_matmul",
    "matmul_least": "lowmem_matmul_least",
    "in_backward": "lowmem_step_in_backward",
    "schedule": "lowmem_schedule",
    "sample": "lowmem_sample",
    "budget": "lowmem_budget",
}


class Patched:
    """What surrounds the arguments: processes, devices, launcher. `later` is set once HuggingFace's checks have run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, run: dict[str, Any]) -> None:
        self.patch, self.run = monkeypatch, run

    def now(self, args: Any = None) -> None:
        run, patch = self.run, self.patch
        if args is not None:
            vars(args).pop("deepspeed_plugin", None)  # HuggingFace's own, which is None
        for name, fact in (("world_size", "processes"), ("n_gpu", "n_gpu")):
            if fact in run:
                patch.setattr(TrainingArguments, name, property(lambda self, value=run[fact]: value))
        if run.get("engine") == "deepspeed":
            patch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
            plugin = SimpleNamespace(deepspeed_config=run.get("zero", {}))
            patch.setattr(TrainingArguments, "deepspeed_plugin", plugin, raising=False)
        if run.get("engine") == "fsdp":
            patch.setenv("ACCELERATE_USE_FSDP", "true")
            patch.setenv("FSDP_VERSION", str(run.get("fsdp_version", 2)))
            patch.setenv("FSDP_OFFLOAD_PARAMS", str(run.get("cpu_offload", False)).lower())

    def later(self) -> None:
        plain = TrainingArguments.__post_init__

        def post_init(args: Any) -> None:
            plain(args)
            self.now(args)

        self.patch.setattr(TrainingArguments, "__post_init__", post_init)


def fields(run: dict[str, Any]) -> dict[str, Any]:
    """Of training arguments."""
    found = ours(run)
    found |= {"lr_scheduler_kwargs": {"tokens_per_step": 64}} if "schedule" in run else {}
    found |= {"lr_scheduler_type": run["scheduler"]} if "scheduler" in run else {}
    found |= {run["precision"]: True} if run.get("precision") in ("fp16", "bf16") else {}
    found |= {"parallelism_config": ParallelismConfig(**run["pieces"])} if "pieces" in run else {}
    found |= {"gradient_checkpointing_kwargs": {"use_reentrant": True}} if run.get("reentrant") else {}
    for fact, name in (
        ("accumulation", "gradient_accumulation_steps"),
        ("compile", "torch_compile"),
        ("checkpointing", "gradient_checkpointing"),
        ("offload", "activation_offloading"),
        ("liger", "use_liger_kernel"),
    ):
        found |= {name: run[fact]} if fact in run else {}
    return found | {"max_grad_norm": run.get("max_grad_norm", 0.0)}


def ours(run: dict[str, Any]) -> dict[str, Any]:
    return {name: run[fact] for fact, name in OURS.items() if fact in run} | run.get("fields", {})


def accelerator(run: dict[str, Any]) -> Any:
    zero = SimpleNamespace(deepspeed_config=run.get("zero", {}))
    sharded = SimpleNamespace(
        fsdp_version=run.get("fsdp_version", 2),
        activation_checkpointing=run.get("checkpointing", False),
        cpu_offload=CPUOffloadPolicy() if run.get("cpu_offload") else None,
    )
    dynamo = SimpleNamespace(backend=SimpleNamespace(value="INDUCTOR" if run.get("compile") else "NO"))
    return SimpleNamespace(
        distributed_type=DistributedType(ENGINES[run.get("engine", "single")]),
        num_processes=run.get("processes", 1),
        mixed_precision=run.get("precision", "no"),
        gradient_accumulation_steps=run.get("accumulation", 1),
        parallelism_config=ParallelismConfig(**run.get("pieces", {})),
        state=SimpleNamespace(deepspeed_plugin=zero, fsdp_plugin=sharded, dynamo_plugin=dynamo),
    )


def other_optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))])


def by_arguments(run: dict[str, Any], patch: pytest.MonkeyPatch, folder: Path) -> None:
    Patched(patch, run).later()
    LowMemSFTConfig(**COMMON | fields(run))


def by_replace(run: dict[str, Any], patch: pytest.MonkeyPatch, folder: Path) -> None:
    made = LowMemSFTConfig(**COMMON, gradient_checkpointing=False)
    Patched(patch, run).now(made)
    made.lowmem_replace(**fields(run))


def by_plugin(run: dict[str, Any], patch: pytest.MonkeyPatch, folder: Path) -> None:
    passed = other_optimizer() if "passed" in run else None
    LowMemPlugin(**ours(run)).prepare(accelerator(run), tiny_llama(), optimizer=passed)


def by_launch(run: dict[str, Any], patch: pytest.MonkeyPatch, folder: Path) -> None:
    zero = run.get("zero", {}).get("zero_optimization", {})
    content = {
        "distributed_type": ENGINES[run.get("engine", "single")],
        "num_processes": run.get("processes", 1),
        "mixed_precision": run.get("precision", "no"),
        "dynamo_config": {"dynamo_backend": "INDUCTOR"} if run.get("compile") else {},
        "fsdp_config": {
            "fsdp_version": run.get("fsdp_version", 2),
            "fsdp_activation_checkpointing": run.get("checkpointing", False),
            "fsdp_offload_params": run.get("cpu_offload", False),
        },
        "parallelism_config": {f"parallelism_config_{name}": size for name, size in run.get("pieces", {}).items()},
        "deepspeed_config": {
            "zero_stage": zero.get("stage", 2),
            "offload_optimizer_device": zero.get("offload_optimizer", {}).get("device", "none"),
        },
        section.KEY: ours(run),
    }
    if run.get("zero", {}).keys() - {"zero_optimization"} or "elastic_checkpoint" in zero:
        file = folder / "zero.json"
        file.write_text(json.dumps(run["zero"]))
        content["deepspeed_config"] = {"deepspeed_config_file": str(file)}
    path = folder / "accelerate.yaml"
    path.write_text(yaml.safe_dump(content))
    given = {"gradient_accumulation_steps": run["accumulation"]} if "accumulation" in run else {}
    prepare(str(path), given)


def by_trainer(run: dict[str, Any], patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Fields are assigned, and an engine set up, after the arguments were made: it is the last to look."""
    common: dict[str, Any] = COMMON | {"output_dir": str(folder)}
    if "passed" in run:
        LowMemSFTTrainer(
            tiny_llama(),
            LowMemSFTConfig(**common | ours(run)),
            train_dataset=Dataset.from_dict({"input_ids": [[3, 4]]}),
            processing_class=word_tokenizer(),
            optimizers=(other_optimizer(), None),
        )
        return
    args = LowMemTrainingArguments(**common)
    trainer: Any = LowMemTrainer(tiny_llama(), args)
    trainer.accelerator = accelerator(run)
    Patched(patch, run).now()
    for name, value in fields(run).items():
        setattr(args, name, value)
    trainer.create_optimizer()


def by_planner(run: dict[str, Any], patch: pytest.MonkeyPatch, folder: Path) -> None:
    args = LowMemSFTConfig(**COMMON, gradient_checkpointing=False)
    parallel = {"fsdp": "fsdp2", "ddp": "ddp"}.get(run.get("engine", "single"))
    around = {k: v for k, v in run.items() if k not in ("processes", "engine" if parallel else "")}
    Patched(patch, around).now(args)
    for name, value in fields(run).items():
        setattr(args, name, value)
    plan(LlamaConfig(num_hidden_layers=1), args, world_size=2 if parallel else 1, parallel=parallel)


def by_axolotl(run: dict[str, Any], patch: pytest.MonkeyPatch, folder: Path) -> None:
    base = ModuleType("axolotl.integrations.base")
    base.BasePlugin = object  # type: ignore[attr-defined]
    for name in ("axolotl", "axolotl.integrations"):
        patch.setitem(sys.modules, name, ModuleType(name))
    patch.setitem(sys.modules, base.__name__, base)
    patch.syspath_prepend(str(INTEGRATIONS / "axolotl"))
    patch.delitem(sys.modules, "hf_lowmem_axolotl", raising=False)
    import hf_lowmem_axolotl  # pyright: ignore[reportMissingImports]

    engine = run.get("engine")
    patch.setenv("WORLD_SIZE", str(run.get("processes", 1)))
    cfg = SimpleNamespace(
        hf_lowmem=ours(run),
        fp16=run.get("precision") == "fp16",
        bf16=run.get("precision") == "bf16",
        gradient_accumulation_steps=run.get("accumulation", 1),
        torch_compile=run.get("compile"),
        gradient_checkpointing=run.get("checkpointing"),
        gradient_checkpointing_kwargs={"use_reentrant": run.get("reentrant")},
        activation_offloading=run.get("offload"),
        context_parallel_size=run.get("pieces", {}).get("cp_size"),
        plugins=["axolotl.integrations.liger.LigerPlugin"] if run.get("liger") else [],
        max_grad_norm=run.get("max_grad_norm", 0.0),
        deepspeed=run.get("zero", {"zero_optimization": {"stage": 2}}) if engine == "deepspeed" else None,
        fsdp_config={"fsdp_version": run.get("fsdp_version", 2)} if engine == "fsdp" else None,
    )
    hf_lowmem_axolotl.HfLowmemPlugin().register(cfg)


def by_callback(run: dict[str, Any], patch: pytest.MonkeyPatch, folder: Path) -> None:
    told = {k: v for k, v in fields(run).items() if not k.startswith("lowmem_") and k not in ("optim", "fp16")}
    args = TrainingArguments(**COMMON)
    for name, value in told.items():
        setattr(args, name, value)
    Patched(patch, run).now()
    LowMemCallback(run["tiers"]).on_init_end(args, None, None, model=tiny_llama())  # type: ignore[arg-type]


DOORS = {
    "arguments": by_arguments,
    "replace": by_replace,
    "plugin": by_plugin,
    "launch": by_launch,
    "trainer": by_trainer,
    "planner": by_planner,
    "axolotl": by_axolotl,
    "callback": by_callback,
}
