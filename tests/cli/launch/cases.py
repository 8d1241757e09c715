"""Trainings that a process alone and two launched ones do alike: what they train, and on which batches.

Two processes with batches of 2 see, together and in this order, the batches of 4 of one process: accelerate deals them
out by turns. So the gradient that DDP and FSDP2 average is that of one process, but for the order of sums. The texts of
SFT have unequal lengths: a mean of the processes' means instead of one over all tokens would show.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from datasets import Dataset, load_from_disk
from peft import LoraConfig, get_peft_model
from torch import Tensor

from hf_lowmem import LowMemDPOConfig, LowMemDPOTrainer, LowMemSFTConfig, LowMemSFTTrainer
from hf_lowmem.distributed import full
from hf_lowmem.preference.losses import PREFERENCE_LOSSES
from hf_lowmem.training.plugin import LowMemPlugin
from tests.conftest import tiny_llama
from tests.training.test_trainers import pair_data

STEPS, TOTAL_BATCH, ROWS = 4, 4, 16
KINDS = ("sft", "asft", "sigmoid", "plugin")
TIERS = ("none", "exact", "fp8", "checkpoint_fp8")


@dataclass(frozen=True)
class Case:
    """kind: sft, a loss of pairs, or plugin; tier: of activations, or none; lora: an adapter, or all weights."""

    kind: str
    tier: str
    lora: bool

    @classmethod
    def named(cls, name: str) -> "Case":
        kind, tier, what = name.split("-")
        return cls(kind, tier, what == "lora")

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.tier}-{'lora' if self.lora else 'full'}"


# Of the other losses one case is enough: they differ in a pure function of numbers that are there anyway.
OTHERS = [Case(name, "exact", lora=False) for name in PREFERENCE_LOSSES if name not in KINDS]
PRODUCT = [Case(*c) for c in itertools.product(KINDS, TIERS, (False, True))] + OTHERS


def prepare(folder: Path, tokenizer: Any) -> None:
    """What every process reads."""
    tokenizer.save_pretrained(folder / "tokenizer")
    tiny_llama(num_hidden_layers=2).save_pretrained(folder / "model")


def texts(shortest: int = 6) -> list[list[int]]:
    ids = torch.randint(3, 128, (ROWS, 12), generator=torch.Generator().manual_seed(0)).tolist()
    return [row[: shortest + i % (13 - shortest)] for i, row in enumerate(ids)]


def lowmem_fields(case: Case) -> dict[str, Any]:
    """All weights take APOLLO, whose projections FSDP2 cuts; an adapter's matrices are too small for it.

    An eps of the gradients' own size keeps Adam from making a rounding of a gradient near zero as large as an update.
    """
    method: dict[str, Any] = {"optim": "adamw"} if case.lora else {"optim": "apollo", "lowmem_rank": 8}
    tier = None if case.tier == "none" else case.tier
    return method | {"learning_rate": 1e-2, "weight_decay": 0.1, "adam_epsilon": 1e-3, "lowmem_activations": tier}


def host_fields(folder: Path, batch: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True,
        "max_steps": STEPS, "save_steps": STEPS // 2, "logging_steps": 1, "per_device_train_batch_size": batch,
    }  # fmt: skip


class Loop:
    """A loop of one's own with the plugin, from its first step or from a checkpoint."""

    def __init__(self, model: Any, plugin: LowMemPlugin, folder: Path, batch: int) -> None:
        self.folder, self.losses = folder, []
        ids = torch.tensor(texts(shortest=12))
        loader = torch.utils.data.DataLoader([{"input_ids": i, "labels": i} for i in ids], batch_size=batch)  # type: ignore[arg-type]
        self.accelerator = Accelerator(cpu=True)
        self.model_wrapped, self.optimizer, self.loader = plugin.prepare(self.accelerator, model.train(), loader)
        self.model: Any = self.accelerator.unwrap_model(self.model_wrapped)
        self.activations = plugin.activations

    def train(self, resume_from_checkpoint: str | None) -> None:
        done = 0
        if resume_from_checkpoint is not None:
            self.accelerator.load_state(resume_from_checkpoint)
            done = STEPS // 2
        for step, batch in enumerate(self.accelerator.skip_first_batches(self.loader, done), start=done + 1):
            loss = self.model_wrapped(**batch).loss
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(self.accelerator.gather(loss.detach()).mean().item())  # type: ignore[union-attr]
            if step == STEPS // 2 and not done:
                self.accelerator.save_state(str(self.folder / f"checkpoint-{step}"))


def make(case: Case, base: Path, folder: Path, tokenizer: Any, batch: int, **fields: Any) -> Any:
    """The trainer or the loop of a case; `base` is the folder that was prepared, `folder` this run's own."""
    fields = lowmem_fields(case) | fields
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM") if case.lora else None
    torch.manual_seed(0)  # of the adapter's first weights
    if case.kind == "plugin":
        model = tiny_llama(num_hidden_layers=2)
        return Loop(model if adapter is None else get_peft_model(model, adapter), LowMemPlugin(**fields), folder, batch)
    fields = host_fields(folder, batch) | fields
    common: dict[str, Any] = {"processing_class": tokenizer, "peft_config": adapter}
    if case.kind == "sft":
        rows = Dataset.from_dict({"input_ids": texts()})
        args = LowMemSFTConfig(**fields)
        return LowMemSFTTrainer(tiny_llama(num_hidden_layers=2), args=args, train_dataset=rows, **common)
    rows = pair_data(ROWS)
    if case.kind == "sigmoid":
        fields["lowmem_reference"] = "adapter" if case.lora else "precomputed"
        rows: Any = load_from_disk(str(folder.parent / f"rows-{folder.name}"))
    # By its path, from which TRL would load a reference.
    return LowMemDPOTrainer(
        str(base / "model"), args=LowMemDPOConfig(loss_type=[case.kind], **fields), train_dataset=rows, **common
    )


def save_rows(folder: Path, case: Case) -> None:
    """A data set in files, of this run alone: TRL keeps the reference's log-probabilities beside it."""
    pair_data(ROWS).save_to_disk(folder / f"rows-{case.name}")


def losses(made: Any) -> list[float]:
    return made.losses if isinstance(made, Loop) else [r["loss"] for r in made.state.log_history if "loss" in r]


def weights(made: Any) -> dict[str, Tensor]:
    """Trained ones, whole, on every process."""
    return {n: full(p).detach().clone() for n, p in made.model.named_parameters() if p.requires_grad}


def train(made: Any, resume: Path | None = None) -> dict[str, Any]:
    start = weights(made)
    made.train(resume_from_checkpoint=None if resume is None else str(resume))
    return {"start": start, "weights": weights(made), "losses": losses(made)}


def fresh_engine() -> None:
    """Before a trainer that follows another in one process: accelerate keeps its engine beyond a trainer's life."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
