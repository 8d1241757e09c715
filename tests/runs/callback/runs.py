"""A small training run, what it has recorded, and what it may have left behind."""

import threading
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import Trainer, TrainingArguments

from hf_lowmem.memory import measure_saved
from tests.conftest import tiny_llama

VOCAB, TOKENS, BATCH = 64, 8, 2


def llama() -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "max_position_embeddings": TOKENS,
    }
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return tiny_llama(**sizes, **heads, attention_dropout=0.1, use_cache=False)


def data(rows: int = 64) -> list[dict[str, torch.Tensor]]:
    ids = (torch.arange(rows * TOKENS) * 7 % VOCAB).view(rows, TOKENS)
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer_of(
    tmp_path: Path,
    *callbacks: Any,
    cls: type[Trainer] = Trainer,
    model: Any = None,
    rows: Any = None,
    **changes: Any,
) -> Trainer:
    rows = rows or data()
    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": BATCH,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    } | changes
    args = TrainingArguments(output_dir=str(tmp_path), **settings)
    model = model or llama()
    return cls(model=model, args=args, train_dataset=rows, eval_dataset=rows[:8], callbacks=list(callbacks))


def curve(trainer: Trainer) -> list[tuple[float, float]]:
    return [(r["loss"], r["grad_norm"]) for r in trainer.state.log_history if "loss" in r]


def records(trainer: Trainer) -> list[dict[str, Any]]:
    return [r for r in trainer.state.log_history if any(k.startswith("lowmem/") for k in r)]


def measuring() -> bool:
    hooks = nn.modules.module
    return (
        torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # pyright: ignore
        or saved_tensors_hooks.__enter__.__module__ != "torch.autograd.graph"
        or bool(hooks._global_forward_hooks)
        or bool(hooks._global_forward_pre_hooks)
    )


def nothing_is_left(model: Any) -> bool:
    return not measuring() and not model._forward_hooks and not model._forward_pre_hooks


def samplers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "hf_lowmem-rss"]


def directly(trainer: Trainer, **inputs: Any) -> tuple[int, dict[str, int], int]:
    """The first micro-batch of an untouched trainer: what a forward pass saves, that by module, and what its loss has
    saved when compute_loss returns."""
    model: Any = trainer.model.train()  # type: ignore[union-attr]
    if trainer.args.gradient_checkpointing:  # which otherwise begins with train()
        model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    (batch,), items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._prepare_inputs(batch)
    with measure_saved(model) as whole:
        loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
    with measure_saved(model) as forward:
        outputs = model(**batch, **(inputs or {"num_items_in_batch": items}))
    del loss, outputs
    return forward.total, forward.by_module_now, whole.total
