"""Additions to a batch of pairs, computed while its tensors are on the host.

A collator around TRL's, rather than one of our own: TRL's pads and truncates, and a user may have passed another. What
is added needs the host: on a GPU, looking for an empty row or hashing tokens would make it wait at every step.
"""

import hashlib
from typing import Any

import torch
from torch import Tensor

# Entries of a batch that no model is given.
MARGINS, KEYS = "lowmem_margins", "lowmem_pair_keys"


class PairCollator:
    """A collator around TRL's: what our losses and features need of a batch, while its tensors are on the host.

    Args:
        collator: makes a batch of B pairs as TRL's does, chosen rows above rejected ones.
        refuse_empty: raise for a completion without a token. TRL's collator gives one, without a word, where a prompt
            fills `max_length`. Its log-probability is 0 and trains nothing, while the pair's other completion would be
            trained alone.
        margin_column: the column whose values become `batch["lowmem_margins"]`, (B,) fp32.
        keyed: whether the batch gets `pair_keys`, unless TRL has precomputed its columns.

    Raises:
        ValueError: for an empty completion; a margin that is missing, negative or no number.
    """

    def __init__(self, collator: Any, *, refuse_empty: bool, margin_column: str | None, keyed: bool) -> None:
        self.collator = collator
        self.refuse_empty = refuse_empty
        self.margin_column = margin_column
        self.keyed = keyed

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        margins = [self._margin(example) for example in examples] if self.margin_column else None
        batch = self.collator(examples)
        if self.refuse_empty:
            self._check_completions(batch["completion_mask"])
        if margins is not None:
            batch[MARGINS] = torch.tensor(margins, dtype=torch.float32)
        if self.keyed and "ref_chosen_logps" not in batch:
            batch[KEYS] = pair_keys(batch)
        return batch

    def _margin(self, example: dict[Any, Any]) -> float:
        value = example.get(self.margin_column)
        if not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise ValueError(
                f"lowmem_margin_column={self.margin_column!r} holds {value!r}: a reward margin is a finite number "
                ">= 0, the reward of the chosen answer less that of the rejected one. Swap the answers of a pair whose "
                "margin is negative, or drop it."
            )
        return float(value)

    @staticmethod
    def _check_completions(mask: Tensor) -> None:
        empty = (mask[:, 1:].sum(dim=1) == 0).nonzero().flatten().tolist()
        if empty:
            row, pairs = empty[0], len(mask) // 2
            raise ValueError(
                f"the {'chosen' if row < pairs else 'rejected'} completion of example {row % pairs} of a batch has no "
                "token, so the pair says nothing. Drop empty completions from the dataset; if the prompt fills "
                "max_length, raise max_length or shorten the prompt."
            )


def pair_keys(batch: dict[str, Any]) -> list[int]:
    """A 64-bit key of each pair of a collated batch, of all that its log-probabilities depend on: B integers.

    BLAKE2b over token ids and completion masks without the padding, so that a pair has one key in every batch. Among
    ten million pairs, two share a key with a probability of 3e-6.
    """
    ids, mask, real = (batch[k].cpu().numpy() for k in ("input_ids", "completion_mask", "attention_mask"))
    pairs = len(ids) // 2
    keys = []
    for i in range(pairs):
        digest = hashlib.blake2b(digest_size=8)
        for row in (i, pairs + i):
            kept = real[row] != 0
            digest.update(int(kept.sum()).to_bytes(8, "little"))
            digest.update(ids[row][kept].astype("<i8").tobytes())
            digest.update((mask[row][kept] != 0).tobytes())
        keys.append(int.from_bytes(digest.digest(), "little", signed=True))
    return keys


def has_images(datasets: dict[str, Any], *, margin_column: str | None, text_only: list[str]) -> bool:
    """Whether the first examples of `datasets`, by name, have images.

    Raises:
        ValueError: where one lacks the column `margin_column`, or has images although a loss or field is for text only.
    """
    examples = {name: next(iter(dataset), {}) for name, dataset in datasets.items() if dataset is not None}
    images = False
    for name, example in examples.items():
        images |= "image" in example or "images" in example
        if images and text_only:
            raise ValueError(
                f"{name} has images, and {text_only[0]!r} does not support vision-language models: it was made and "
                "tested for text. Use TRL's losses, and leave the fields of lowmem's preference training unset."
            )
        if margin_column is not None and example and margin_column not in example:
            raise ValueError(
                f"lowmem_margin_column={margin_column!r}: {name} has no such column. It has: {', '.join(example)}."
            )
    return images
