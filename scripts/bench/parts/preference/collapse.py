"""Collapse: what a preference loss does to answers that were right before.

From one SFT start a seed, stopped where most answers are right but not all, each method trains on pairs of the right
answer and a wrong one that the start itself gave. Losses that only compare are content when the rejected answer falls
faster than the chosen one; whether the chosen one survives shows in exact match, and in the two log-probabilities, not
in the accuracy of the margin.

Sums are disjoint: for the SFT start, for the pairs, for validation and for the test. Every method has the same five
learning rates, all of them run on all seeds; a rate is chosen by validation alone (mean over seeds), in two ways that
the report shows side by side: by exact match, and by the accuracy of the margin, which is what trainers log.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from parts.preference import sums
from parts.preference.train import METHODS, Budget, quiet, sft, train
from parts.record import Row, Rows

SIZE: dict[str, Any] = {
    "sums": {"sft": 3000, "pairs": 2000, "validation": 600, "test": 1500},
    "hidden": 96,
    "layers": 2,
    "sft_steps": 2000,  # at most
    "sft_batch": 64,
    "sft_rate": 2e-3,
    "sft_until": 0.85,  # exact match on the validation sums
    "sft_look": 20,  # steps between two looks
    "draws": 8,
    "steps": 200,
    "batch": 32,
}
SMOKE = SIZE | {
    "sums": {"sft": 64, "pairs": 24, "validation": 16, "test": 16},
    "hidden": 32,
    "layers": 1,
    "sft_steps": 4,
    "sft_batch": 16,
    "sft_look": 2,
    "draws": 2,
    "steps": 2,
    "batch": 4,
}
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
SEEDS = (0, 1, 2)
HELD_OUT = ("validation", "test")


class StopWhenGood(TrainerCallback):
    """Ends a training once exact match on `held_out` is `until` or more; it is looked at every `every` steps.

    A number of steps would not do: how soon the model learns to carry varies with the seed by a factor of two.
    """

    def __init__(self, held_out: list[sums.Sum], until: float, every: int) -> None:
        self.held_out, self.until, self.every = held_out, until, every

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step % self.every == 0:
            control.should_training_stop = sums.exact_match(model, self.held_out) >= self.until
            model.train()


class Ground:
    """What all runs of a seed share: the SFT start, the pairs to train on, held-out pairs and their first log-probs.

    cache: a folder; the start is kept there, and made again where it is missing.
    """

    def __init__(self, seed: int, size: dict[str, Any], cache: Path) -> None:
        self.seed, self.size = seed, size
        parts = sums.split(list(size["sums"].values()), seed)
        self.sums = dict(zip(size["sums"], parts, strict=True))
        self.start = cache / f"sums-{size['hidden']}x{size['layers']}-{size['sft_until']}-{size['sft_steps']}-{seed}"
        self.sft_seconds: float | None = None
        if not self.start.is_dir():
            self._train_start()
        model = self.load()
        self.pairs = {
            part: sums.wrong_answers(model, self.sums[part], draws=size["draws"], seed=seed)
            for part in ("pairs", *HELD_OUT)
        }
        self.before = {part: sums.pair_logps(model, self.pairs[part]) for part in HELD_OUT}

    def _train_start(self) -> None:
        size, began = self.size, time.perf_counter()
        model = sums.build_model(size["hidden"], size["layers"], self.seed)
        budget = Budget(size["sft_steps"], size["sft_batch"], size["sft_rate"], self.seed)
        with quiet():
            model = sft(
                model,
                sums.answered(self.sums["sft"]),
                sums.tokenizer(),
                budget,
                callbacks=[StopWhenGood(self.sums["validation"], size["sft_until"], size["sft_look"])],
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=50,
            )
            partial = self.start.with_suffix(".partial")
            model.save_pretrained(partial)
            sums.tokenizer().save_pretrained(partial)
            partial.rename(self.start)
        self.sft_seconds = time.perf_counter() - began

    def load(self) -> Any:
        with quiet():
            return AutoModelForCausalLM.from_pretrained(self.start, dtype=torch.float32)

    def score(self, model: Any) -> dict[str, dict[str, float]]:
        """What is measured, by held-out part."""
        found = {}
        for part in HELD_OUT:
            after, before = sums.pair_logps(model, self.pairs[part]), self.before[part]
            found[part] = {"exact": sums.exact_match(model, self.sums[part])} | compared(after, before)
        return found


def compared(after: dict[str, Tensor], before: dict[str, Tensor]) -> dict[str, float]:
    """Means over pairs; log-probabilities are nats a token.

    margin_accuracy: share of the pairs whose margin, chosen less rejected, has grown: DPO's rewards/accuracies.
    pair_accuracy: share of the pairs whose chosen answer has the higher log-probability a token.
    """
    grown = (after["chosen"] - before["chosen"]) > (after["rejected"] - before["rejected"])
    chosen, rejected = (after[side] / after[f"{side}_len"] for side in ("chosen", "rejected"))
    return {
        "margin_accuracy": grown.double().mean().item(),
        "pair_accuracy": (chosen > rejected).double().mean().item(),
        "chosen": chosen.double().mean().item(),
        "rejected": rejected.double().mean().item(),
    }


def rows(smoke: bool, old: Rows, cache: Path) -> Iterator[Row]:
    """The start of each seed, then every method at every rate; those of `old` are not made again."""
    size = SMOKE if smoke else SIZE
    done = {(r["seed"], r["method"], r["rate"]) for r in old if r["size"] == size}
    for seed in SEEDS[:1] if smoke else SEEDS:
        rates = RATES[-1:] if smoke else RATES
        wanted = [("start", None), *((m, r) for r in rates for m in METHODS)]
        missing = [(m, r) for m, r in wanted if (seed, m, r) not in done]
        if not missing:
            continue
        ground = Ground(seed, size, cache)
        for method, rate in missing:
            common = {"seed": seed, "method": method, "rate": rate, "size": size}
            if rate is None:
                model, seconds = ground.load(), ground.sft_seconds
                common |= {"parameters": sum(p.numel() for p in model.parameters())}
                common |= {"pairs": {part: len(pairs) for part, pairs in ground.pairs.items()}}
            else:
                model, seconds = run(ground, method, rate)
            yield common | ground.score(model) | {"options": METHODS.get(method), "seconds": seconds}


def run(ground: Ground, method: str, rate: float) -> tuple[Any, float]:
    budget = Budget(ground.size["steps"], ground.size["batch"], rate, ground.seed)
    pairs = sums.preferences(ground.pairs["pairs"])
    return train(method, str(ground.start), pairs, sums.tokenizer(), budget)
