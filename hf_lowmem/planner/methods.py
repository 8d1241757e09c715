"""The kinds of training that can be planned: which trainer, and what a full batch of it looks like.

A full batch has every row at `max_length`, all of its tokens trained on: the largest that a data set can give. A
shorter or padded one takes less.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from hf_lowmem.losses.collate import MARGINS

__all__ = ["METHODS", "Method", "method_of"]


@dataclass(frozen=True)
class Method:
    """config, home, name: of the arguments and the trainer. rows: sequences an example has. columns: a data set of one
    row, which is never trained on but must look right. batch: of ids (sequences, tokens) and the trainer."""

    config: str
    home: str
    name: str
    rows: int
    columns: dict[str, Any]
    batch: Callable[[Tensor, Any], dict[str, Tensor]]

    def arguments(self) -> type:
        return getattr(import_module(self.home), self.config)

    def trainer(self) -> type:
        return getattr(import_module(self.home), self.name)

    def make_batch(self, trainer: Any) -> dict[str, Tensor]:
        """A full micro-batch, as the trainer's collator would have made it."""
        return self.batch(torch.zeros(*self.shape(trainer.args), dtype=torch.long), trainer)

    def shape(self, args: Any) -> tuple[int, int]:
        """(sequences, tokens) of one micro-batch.

        Raises:
            ValueError: where max_length is not set, so that a batch has no largest size.
        """
        if args.max_length is None:
            raise ValueError("max_length=None: a batch has no largest size. Set max_length, in tokens.")
        multiple = getattr(args, "pad_to_multiple_of", None) or 1
        return args.per_device_train_batch_size * self.rows, -(-args.max_length // multiple) * multiple

    def make(self, cls: type, model: Any, args: Any, peft_config: Any, dataset: Any, tokenizer: Any) -> Any:
        return cls(model=model, args=args, train_dataset=dataset, processing_class=tokenizer, peft_config=peft_config)


def _sft_batch(ids: Tensor, trainer: Any) -> dict[str, Tensor]:
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def _pairs_batch(ids: Tensor, trainer: Any) -> dict[str, Tensor]:
    """Chosen answers above rejected ones. The prompt has no token, so that all are scored."""
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": torch.ones_like(ids)}
    pairs = len(ids) // 2
    if trainer.precompute_ref_logps:
        batch |= {"ref_chosen_logps": torch.zeros(pairs), "ref_rejected_logps": torch.zeros(pairs)}
    if trainer.args.lowmem_margin_column is not None:
        batch[MARGINS] = torch.zeros(pairs)
    return batch


METHODS = {
    "sft": Method("LowMemSFTConfig", "hf_lowmem.sft", "LowMemSFTTrainer", 1, {"input_ids": [[1, 1]]}, _sft_batch),
    "dpo": Method(
        "LowMemDPOConfig",
        "hf_lowmem.dpo",
        "LowMemDPOTrainer",
        2,
        {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]},
        _pairs_batch,
    ),
}


def method_of(args: Any) -> Method:
    """The method whose arguments these are.

    Raises:
        TypeError: for arguments of another kind.
    """
    for method in METHODS.values():
        if isinstance(args, method.arguments()):
            return method
    names = " or ".join(method.config for method in METHODS.values())
    raise TypeError(f"args: expected {names}, which name the trainer to plan for, got {type(args).__name__}.")
