"""Tiny runs of each trainer, and a report that was made up."""

import copy
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig

from hf_lowmem import (
    LowMemDPOConfig,
    LowMemDPOTrainer,
    LowMemSFTConfig,
    LowMemSFTTrainer,
    LowMemTrainer,
    LowMemTrainingArguments,
)
from hf_lowmem.runs.callback import MemoryReportCallback
from tests.conftest import tiny_llama
from tests.training.test_trainers import pair_data, settings, token_data

OURS: dict[str, Any] = {"optim": "apollo_mini", "lowmem_state": "int8"}
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}


def sft(folder: Path, tokenizer: Any, **changes: Any) -> Any:
    args = settings(LowMemSFTConfig, folder, **(OURS | {"max_length": 16} | changes))
    data = {"train_dataset": token_data(), "eval_dataset": token_data(4)}
    return LowMemSFTTrainer(tiny_llama(), args=args, processing_class=tokenizer, **data)


def dpo(folder: Path, tokenizer: Any, **changes: Any) -> Any:
    args = settings(LowMemDPOConfig, folder, **(OURS | {"loss_type": "asft", "max_steps": 1} | changes))
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    data: Any = pair_data(8)
    return LowMemDPOTrainer(tiny_llama(), args=args, train_dataset=data, processing_class=tokenizer, peft_config=lora)


def plain(folder: Path, **changes: Any) -> Any:
    args = settings(LowMemTrainingArguments, folder, **(OURS | {"max_steps": 1} | changes))
    return LowMemTrainer(tiny_llama(), args, train_dataset=token_data())


def reporter(trainer: Any) -> MemoryReportCallback:
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, MemoryReportCallback))


_REPORT: dict[str, Any] = {
    "format": 3,
    "run": "made-up",
    "trainer": "LowMemSFTTrainer",
    "config": "LowMemSFTConfig",
    "model": {"name": "org/Tiny", "parameters": 2000, "trained": 1000, "dtype": "bfloat16"},
    "dataset": {"name": "tiny", "rows": 10},
    "settings": {"optim": "apollo_mini", "learning_rate": 0.01},
    "device": "a GPU",
    "processes": 2,
    "versions": {"torch": "2.13.0"},
    "head": None,
    "predicted": None,
    "trainings": [
        {
            "from_step": 0,
            "to_step": 4,
            "finished": True,
            "memory": {"weights": 1024, "saved": 2048, "peak": 4096, "peak_source": "cuda allocator"},
            "speed": {"tokens_per_second": 123.456},
        }
    ],
    "results": {"steps": 4, "last_loss": 1.5},
    "history": [{"step": 1, "epoch": 0.1, "loss": 2.0}, {"step": 4, "epoch": 0.4, "loss": 1.5}],
    "card_frame": None,
}
PLAN: dict[str, Any] = {
    "peak_bytes": 5 * 1024,
    "parts": {"weights": 1024, "gradients": 0},
    "timeline": [{"step": 1, "phase": "backward", "module": "a", "weights": 1024, "gradients": 3 * 1024}],
    "saved_bytes": 2048,
    "phase": "backward",
    "module": "a",
    "settings": {"device": "cuda"},
}


# Of a model card's metadata, what the hub takes; see huggingface_hub.ModelCardData.
STRINGS = {"library_name", "license", "license_name", "license_link", "model_name", "pipeline_tag"}
LISTS = {"tags", "datasets", "base_model", "language", "metrics", "license"}
REPOS = {"datasets", "base_model"}


def hub_accepts(path: Path) -> None:
    """The hub's check of a card's metadata, as far as it can be made without the hub: YAML of known keys, names and
    lists of names, and for models and data sets names that a repository can have."""
    data = ModelCard.load(path, ignore_metadata_errors=False).data.to_dict()
    assert data.keys() <= STRINGS | LISTS | {"model-index", "licence"}, "TRL writes that as well"
    assert {"tags", "library_name"} <= data.keys()
    for key, value in data.items():
        names = value if isinstance(value, list) else [value]
        assert key == "model-index" or all(isinstance(n, str) and n not in ("", "None") for n in names), (key, value)
        assert key in LISTS or not isinstance(value, list)
        for name in names if key in REPOS else ():
            validate_repo_id(name.removeprefix("adapter:"))
    assert all("\n" not in tag for tag in data["tags"])


def made_up(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(_REPORT) | changes
