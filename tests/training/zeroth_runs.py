"""One run of zeroth order, for one process and for two."""

from pathlib import Path
from typing import Any

import torch

from tests.conftest import tiny_llama

RATES = {"zo_sign": 1e-4, "zo_adam": 1e-4, "zo_adamm": 1e-4, "fzoo": 1e-6}


def data() -> Any:
    ids = torch.randint(3, 128, (16, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def model() -> Any:
    """Of an odd number of embeddings, which two processes cannot share evenly."""
    return tiny_llama(vocab_size=129).double()


def settings(folder: Path, optim: str, *, rows: int) -> dict[str, Any]:
    """Of training arguments; `rows`: of a batch on one process; `optim` may have options behind a colon."""
    optim, _, options = optim.partition(":")
    own = {"optim_args": options} if options else {}
    return own | {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 3,
        "optim": optim, "learning_rate": RATES.get(optim, 1e-3), "max_grad_norm": 0.0, "save_strategy": "no",
        "per_device_train_batch_size": rows, "lr_scheduler_type": "constant",
    }  # fmt: skip
