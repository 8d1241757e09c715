"""Small trainers over one set of pairs, and what is compared of them."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from hf_lowmem import LowMemDPOConfig, LowMemDPOTrainer
from tests.conftest import tiny_llama
from tests.training.test_trainers import pair_data, settings

ROWS = 6


def policy(seed: int = 0, **overrides: Any) -> Any:
    """A Llama whose linear layers bitsandbytes can quantise also on a CPU."""
    fields: dict[str, Any] = {"intermediate_size": 128} | overrides
    return tiny_llama(seed, **fields)


def data(rows: int = 16) -> Dataset:
    return pair_data(rows)


def trainer(
    folder: Path, tokenizer: Any, loss_type: Any = "sigmoid", *, kind: Any = LowMemDPOTrainer, model: Any = None,
    ref_model: Any = None, train: Any = None, evals: Any = None, extra: dict[str, Any] | None = None, **fields: Any,
) -> Any:  # fmt: skip
    # TRL's own trainer is an oracle only with its own config: one that is handed ours becomes ours.
    config = DPOConfig if kind is DPOTrainer else LowMemDPOConfig
    args = settings(config, folder, loss_type=loss_type, **fields)
    return kind(
        policy() if model is None else model, ref_model, args, train_dataset=data() if train is None else train,
        eval_dataset=evals, processing_class=tokenizer, **extra or {},
    )  # fmt: skip


def first_batch(made: Any, rows: int = ROWS) -> dict[str, Any]:
    """The first pairs of the trainer's own prepared data, through its own collator."""
    source = made.train_dataset
    examples = list(source.take(rows)) if hasattr(source, "_ex_iterable") else [source[i] for i in range(rows)]
    return made._prepare_inputs(made.data_collator(examples))


def loss_and_gradients(made: Any, batch: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    made.model.zero_grad()
    loss = made.compute_loss(made.model, first_batch(made) if batch is None else batch)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in made.model.named_parameters() if p.grad is not None}


def assert_same(got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]], atol: float) -> None:
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=atol)
    assert got[1].keys() == want[1].keys()
    assert any(gradient.abs().max() > 100 * atol for gradient in want[1].values()), "so small that anything is equal"
    for name, gradient in want[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
