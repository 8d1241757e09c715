"""The referee: held-out loss and pair accuracy, by one piece of code for every run.

It uses nothing but a plain forward pass of the model, none of what the trainers compute, so that no run is
judged by its own book-keeping. Held-out texts are cut to one length: the mean over tokens is the mean over
texts.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor

if TYPE_CHECKING:  # the demo's own process only hands a referee on, and need not load models for that
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100


@dataclass(frozen=True)
class PairScore:
    """Score of a model on held-out pairs: how well it tells true lines from others."""

    accuracy: float  # share of pairs whose chosen lines have the higher log-probability per token
    accuracy_error: float  # standard error of that share
    margin: float  # mean of chosen - rejected, nats per token
    margin_error: float  # standard error of that mean
    margins: list[float]  # of each pair

    @classmethod
    def of(cls, margins: list[float]) -> "PairScore":
        accuracy = statistics.fmean(margin > 0 for margin in margins)
        error = math.sqrt(accuracy * (1 - accuracy) / len(margins))
        return cls(accuracy, error, *mean_and_error(margins), margins)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


@dataclass(frozen=True)
class Referee:
    """Scores a model on texts (column ``text``) and pairs (``prompt``, ``chosen``, ``rejected``) it never
    saw."""

    texts: Dataset
    pairs: Dataset
    max_length: int  # tokens of a text that count
    batch: int = 8

    def loss(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> float:
        """Mean negative log-likelihood per token of the held-out texts, in nats."""
        rows = tokenizer(list(self.texts["text"]), truncation=True, max_length=self.max_length)["input_ids"]
        sums, counts = self._logps(model, [(ids, 1) for ids in rows])  # the first token has nothing before it
        return -float(sums.sum() / counts.sum())

    def pair_score(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> PairScore:
        """Both answers of a pair end in the end-of-text token, as the trainers show them."""
        rows = []
        for side in ("chosen", "rejected"):
            for prompt, answer in zip(self.pairs["prompt"], self.pairs[side], strict=True):
                start = len(tokenizer(prompt)["input_ids"])
                rows.append((tokenizer(prompt + answer + str(tokenizer.eos_token))["input_ids"], start))
        sums, counts = self._logps(model, rows)
        chosen, rejected = (sums / counts).chunk(2)
        return PairScore.of((chosen - rejected).tolist())

    def _logps(self, model: "PreTrainedModel", rows: Sequence[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
        """Σ log p of the tokens from ``start`` on and their number, for each (ids, start); fp64 on the
        CPU."""
        sums, counts = (
            torch.zeros(len(rows), dtype=torch.float64),
            torch.zeros(len(rows), dtype=torch.float64),
        )
        training = model.training
        model.eval()
        with torch.no_grad():
            for where, ids, labels in self._batches(rows):
                ids, labels = ids.to(model.device), labels.to(model.device)
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
                losses = F.cross_entropy(
                    logits.flatten(0, 1).float(),
                    labels[:, 1:].flatten(),
                    ignore_index=IGNORED,
                    reduction="none",
                )
                sums[where] = -losses.double().view(len(where), -1).sum(1).cpu()
                counts[where] = (labels[:, 1:] != IGNORED).sum(1).double().cpu()
        model.train(training)
        return sums, counts

    def _batches(self, rows: Sequence[tuple[list[int], int]]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Rows of like length together: (their places, ids (B, T), labels (B, T)).

        The padding is on the right, where a causal model's real tokens never look: no mask is needed.
        """
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
        for first in range(0, len(order), self.batch):
            where = order[first : first + self.batch]
            width = max(len(rows[i][0]) for i in where)
            ids = torch.zeros(len(where), width, dtype=torch.long)
            labels = torch.full((len(where), width), IGNORED)
            for row, i in enumerate(where):
                tokens, start = torch.tensor(rows[i][0]), rows[i][1]
                ids[row, : len(tokens)] = tokens
                labels[row, start : len(tokens)] = tokens[start:]
            yield where, ids, labels
