"""The kinds of training that can be planned: which trainer, and what a full batch of it looks like.

A full batch has every row at `max_length`, all of its tokens trained on: the largest that a data set can give. A
shorter or padded one takes less.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_lowmem.planner.accelerator import outside_of_modes
from hf_lowmem.preference.collate import MARGINS
from hf_lowmem.preference.sharing import shared_layout
from hf_lowmem.training.dpo import LowMemDPOConfig, LowMemDPOTrainer
from hf_lowmem.training.sft import LowMemSFTConfig, LowMemSFTTrainer

__all__ = ["METHODS", "Method", "method_of"]


@dataclass(frozen=True)
class Method:
    """config, trainer: the classes. rows: sequences an example has. columns: a data set of one row, which is never
    trained on but must look right. batch: of ids (sequences, tokens) and the trainer."""

    config: type
    trainer: type
    rows: int
    columns: dict[str, Any]
    batch: Callable[[Tensor, Any], dict[str, Any]]

    def data(self, args: Any) -> dict[str, Any]:
        """The columns, with those that the arguments ask for."""
        margins = getattr(args, "lowmem_margin_column", None)
        return self.columns if margins is None else self.columns | {margins: [0.0]}

    def make_batch(self, trainer: Any, *, evaluation: bool = False) -> dict[str, Any]:
        """A full micro-batch of training, or of evaluation, as the trainer's collator would have made it."""
        return self.batch(torch.zeros(*self.shape(trainer.args, evaluation=evaluation), dtype=torch.long), trainer)

    def has_documents(self, args: Any) -> bool:
        """Whether a row of a batch may hold several sequences: under TRL's packing, and where it flattens a batch."""
        if self.rows > 1:  # DPOTrainer has padding_free, and does not heed it
            return False
        flat = args.padding_free and args.per_device_train_batch_size > 1
        return flat or (args.packing and args.packing_strategy != "wrapped")

    def shape(self, args: Any, *, evaluation: bool = False) -> tuple[int, int]:
        """(sequences, tokens) of one micro-batch. Of packed or flattened ones, too, which put them in one row.

        Raises:
            ValueError: where max_length is not set, so that a batch has no largest size.
        """
        if args.max_length is None:
            raise ValueError("max_length=None: a batch has no largest size. Set max_length, in tokens.")
        multiple = getattr(args, "pad_to_multiple_of", None) or 1
        size = args.per_device_eval_batch_size if evaluation else args.per_device_train_batch_size
        return size * self.rows, -(-args.max_length // multiple) * multiple

    def make(self, cls: type, model: Any, args: Any, peft_config: Any, dataset: Any, tokenizer: Any) -> Any:
        return cls(model=model, args=args, train_dataset=dataset, processing_class=tokenizer, peft_config=peft_config)


def _sft_batch(ids: Tensor, trainer: Any) -> dict[str, Any]:
    batch = {"input_ids": ids, "labels": ids.clone()}
    if not trainer.padding_free:
        return batch | {"attention_mask": torch.ones_like(ids)}
    # In one row, as TRL's collator does it. Packed sequences are shorter than max_length, so that there are several.
    tokens = ids.numel()
    length = ids.shape[1] if not trainer.args.packing else -(-ids.shape[1] // 2)
    ends = torch.tensor([*range(0, tokens, length), tokens], dtype=torch.int32)
    places = torch.arange(tokens)[None]
    return {
        **{name: values.view(1, tokens) for name, values in batch.items()},
        "position_ids": places % length,
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": length,
        "max_length_k": length,
        "seq_idx": (places // length).int(),
    }


def _pairs_batch(ids: Tensor, trainer: Any) -> dict[str, Any]:
    """Chosen answers above rejected ones. The prompt has no token, so that all are scored; a shared one has one, which
    is scored in no batch, so that rows are as long as rows with a prompt can be."""
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": torch.ones_like(ids)}
    args, pairs = trainer.args, len(ids) // 2
    if trainer.precompute_ref_logps:
        batch |= {"ref_chosen_logps": torch.zeros(pairs), "ref_rejected_logps": torch.zeros(pairs)}
    if args.lowmem_margin_column is not None:
        batch[MARGINS] = torch.zeros(pairs)
    if args.lowmem_share_prompt:
        # Where tokens stand is worked out on real ones, whatever stands for them here.
        layout = outside_of_modes(_shared_rows)(*ids.shape, args.lowmem_pack_tokens, args.pad_to_multiple_of)
        batch |= {name: indices.clone() for name, indices in layout.items()}
    return batch


def _shared_rows(sequences: int, tokens: int, budget: int | None, multiple: int | None) -> dict[str, Tensor]:
    ones = torch.ones(sequences, tokens, dtype=torch.long)
    answers = ones.clone()
    answers[:, 0] = 0
    return shared_layout(ones, ones, answers, budget=budget, multiple=multiple or 1)


METHODS = {
    "sft": Method(LowMemSFTConfig, LowMemSFTTrainer, 1, {"input_ids": [[1, 1]]}, _sft_batch),
    "dpo": Method(
        LowMemDPOConfig, LowMemDPOTrainer, 2, {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}, _pairs_batch
    ),
}


def method_of(args: Any) -> Method:
    """The method whose arguments these are.

    Raises:
        TypeError: for arguments of another kind.
    """
    for method in METHODS.values():
        if isinstance(args, method.config):
            return method
    names = " or ".join(method.config.__name__ for method in METHODS.values())
    raise TypeError(f"args: expected {names}, which name the trainer to plan for, got {type(args).__name__}.")
