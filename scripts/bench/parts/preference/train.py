"""One training of the comparisons: which losses, with which options, and the same budget for each.

Options are each paper's own for a model that has had an SFT stage, fixed beforehand and the same in every part; only
the learning rate is searched, over the same grid for every method. The SFT control sees the chosen answers of the same
pairs in as many steps, so it reads about half the tokens.
"""

import gc
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from transformers import PrinterCallback

from hf_lowmem import LowMemDPOConfig, LowMemDPOTrainer, LowMemSFTConfig, LowMemSFTTrainer

METHODS: dict[str, dict[str, Any] | None] = {
    "SFT": None,
    "DPO": {"loss_type": ["sigmoid"], "beta": 0.1, "lowmem_reference": "precomputed"},
    "DPO+SFT": {"loss_type": ["sigmoid", "sft"], "beta": 0.1, "lowmem_reference": "precomputed"},
    "ASFT": {"loss_type": ["asft"], "beta": 0.1, "asft_lambda": 1.0},
    "ASFT, beta 1": {"loss_type": ["asft"], "beta": 1.0, "asft_lambda": 1.0},
    "ORPO": {"loss_type": ["orpo"], "orpo_lambda": 0.1},
    "SimPO": {"loss_type": ["simpo"], "beta": 2.0, "simpo_gamma": 0.5},
    "CPO": {"loss_type": ["cpo"], "beta": 0.1, "cpo_alpha": 1.0},
}


@dataclass(frozen=True)
class Budget:
    """What a run may spend: `steps` of `batch` pairs, at `rate`, cosine after a tenth of warm-up."""

    steps: int
    batch: int
    rate: float
    seed: int

    def settings(self) -> dict[str, Any]:
        return {
            "max_steps": self.steps,
            "per_device_train_batch_size": self.batch,
            "learning_rate": self.rate,
            "seed": self.seed,
            "lr_scheduler_type": "cosine",
            "warmup_steps": max(1, self.steps // 10),
            "weight_decay": 0.0,
            "max_length": None,
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and no advice of the libraries: a record has hundreds of runs."""
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.environ.pop("TQDM_DISABLE")
        if before is not None:
            os.environ["TQDM_DISABLE"] = before


def sft(
    model: Any, answered: Dataset, tokenizer: Any, budget: Budget, *, callbacks: Sequence[Any] = (), **more: Any
) -> Any:
    """`model`, trained in place on the columns prompt and completion."""
    with quiet(), tempfile.TemporaryDirectory() as out:
        args = LowMemSFTConfig(out, **(budget.settings() | more))
        trainer = LowMemSFTTrainer(
            model, args=args, train_dataset=answered, processing_class=tokenizer, callbacks=list(callbacks)
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return trainer.model


def train(method: str, start: str, pairs: Dataset, tokenizer: Any, budget: Budget, **more: Any) -> tuple[Any, float]:
    """(model, seconds): the model of the folder `start`, trained by `method` on prompt, chosen and rejected."""
    gc.collect()
    began = time.perf_counter()
    loss = METHODS[method]
    if loss is None:
        answered = pairs.rename_column("chosen", "completion").remove_columns("rejected")
        model = transformers.AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
        more.pop("lowmem_share_prompt", None)  # there is one answer a prompt
        return sft(model, answered, tokenizer, budget, **more), time.perf_counter() - began
    with quiet(), tempfile.TemporaryDirectory() as out:
        args = LowMemDPOConfig(out, **(budget.settings() | loss | more))
        trainer = LowMemDPOTrainer(start, args=args, train_dataset=pairs, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return trainer.model, time.perf_counter() - began
