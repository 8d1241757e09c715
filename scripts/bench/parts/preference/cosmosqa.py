"""Right against wrong answers of CosmosQA: SFT, DPO, ASFT, ORPO and SimPO with one budget each.

SmolLM2-135M-Instruct, all weights in fp32, the shortest stories. The numbers of pairs, of steps and of tried learning
rates are the same for every method; the rate is chosen on a seed of its own, by pair accuracy on validation questions.
A seed draws the training pairs and their order; the test questions are the same for all. The budget is small, so
that the whole record takes under an hour of one core: look at the spread of the seeds before believing a difference.

Pair accuracy is the share of the test questions whose right answer has the higher mean log-probability a token.
Exactness is that of the greedy answer, word for word; as few answers ever are, the overlap of words with the right and
with the wrong one (F1) and the share of answers that end by themselves stand beside it.
"""

import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl.trainer import utils as trl_utils
from trl.trainer.dpo_trainer import DataCollatorForPreference

from hf_lowmem.demo.model import prepare_model
from hf_lowmem.preference.losses import pair_logps
from hf_lowmem.preference.sharing import SharedPairs, share_prompts, unshare_prompts
from parts.preference import qa, sums
from parts.preference.collapse import compared
from parts.preference.train import METHODS, Budget, quiet, train
from parts.record import Row, Rows

SIZE: dict[str, Any] = {
    "prompt_tokens": 64,
    "answer_tokens": 12,
    "validation": 64,
    "test": 128,
    "generated": 48,  # of the test
    "new_tokens": 16,
    "steps": 6,
    "batch": 8,
}
SMOKE = SIZE | {"validation": 4, "test": 6, "generated": 4, "new_tokens": 3, "steps": 2, "batch": 2}
RATES = (1e-5, 4e-5)
COMPARED = ("SFT", "DPO", "ASFT", "ORPO", "SimPO")
SEEDS = (0, 1, 2)
TUNING_SEED = 100
SHARED = {"lowmem_share_prompt": True}  # exact, and less work


class Ground:
    """The start, the questions, and how a model is scored; the same for every run."""

    def __init__(self, size: dict[str, Any], cache: Path, smoke: bool) -> None:
        self.size = size
        if smoke:
            self.start = str(toy_model(cache / "toy"))
            self.tokenizer = AutoTokenizer.from_pretrained(self.start)
            questions = qa.toy()
        else:
            self.start = prepare_model(None, cache)
            self.tokenizer = AutoTokenizer.from_pretrained(self.start)
            limits = {name: size[name] for name in ("prompt_tokens", "answer_tokens")}
            questions = qa.read(qa.fetch(cache), self.tokenizer, **limits)
        held_out = size["validation"] + size["test"]
        self.validation, self.test = questions[: size["validation"]], questions[size["validation"] : held_out]
        self.train = questions[held_out:]
        needed = size["steps"] * size["batch"]
        if len(self.train) < needed:
            raise ValueError(f"{len(self.train)} training questions are left, but a run needs {needed}.")
        self._before: dict[str, dict[str, Tensor]] = {}

    def pairs(self, seed: int) -> list[qa.Question]:
        return random.Random(seed).sample(self.train, self.size["steps"] * self.size["batch"])

    def load(self) -> Any:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(self.start, dtype=torch.float32)
        trl_utils.add_fused_lm_head(model)
        return model

    def before(self, part: str) -> dict[str, Tensor]:
        if part not in self._before:
            self._before[part] = self.logps(self.load(), getattr(self, part))
        return self._before[part]

    @torch.no_grad()
    def logps(self, model: Any, questions: Sequence[qa.Question]) -> dict[str, Tensor]:
        """Sums and lengths, as the trainer counts them: the answer and its end token."""
        model.eval()
        collate = SharedPairs(DataCollatorForPreference(pad_token_id=self.tokenizer.pad_token_id))
        share_prompts(model)
        found = []
        for i in range(0, len(questions), 16):
            batch: dict[str, Any] = collate([self._ids(q) for q in questions[i : i + 16]])
            mask = batch.pop("completion_mask")
            labels = batch["input_ids"].masked_fill(mask == 0, -100)
            logps = model(**batch, labels=labels, use_cache=False, fused_lm_head=True).log_probs
            found.append(pair_logps(logps, mask[:, 1:]))
        unshare_prompts(model)
        names = ("chosen", "rejected", "chosen_len", "rejected_len")
        return {name: torch.cat([getattr(p, name) for p in found]) for name in names}

    def _ids(self, question: qa.Question) -> dict[str, list[int]]:
        end = self.tokenizer.eos_token
        prompt = self.tokenizer(question.prompt)["input_ids"]
        whole = [self.tokenizer(question.prompt + a + end)["input_ids"] for a in (question.right, question.wrong)]
        return {
            "prompt_ids": prompt,
            "chosen_ids": whole[0][len(prompt) :],
            "rejected_ids": whole[1][len(prompt) :],
        }

    @torch.no_grad()
    def generated(self, model: Any, questions: Sequence[qa.Question]) -> dict[str, float]:
        """How the greedy answers compare with the right and the wrong ones."""
        model.eval()
        inputs = self.tokenizer([q.prompt for q in questions], return_tensors="pt", padding=True, padding_side="left")
        with quiet():
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=self.size["new_tokens"],
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
            )
        new = output[:, inputs["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        count = len(questions)
        return {
            "exact": sum(words(t) == words(q.right) for t, q in zip(texts, questions, strict=True)) / count,
            "overlap_right": sum(overlap(t, q.right) for t, q in zip(texts, questions, strict=True)) / count,
            "overlap_wrong": sum(overlap(t, q.wrong) for t, q in zip(texts, questions, strict=True)) / count,
            "ended": (new == self.tokenizer.eos_token_id).any(dim=1).double().mean().item(),
        }

    def score(self, model: Any) -> dict[str, float]:
        found = compared(self.logps(model, self.test), self.before("test"))
        return found | self.generated(model, self.test[: self.size["generated"]])


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def overlap(text: str, answer: str) -> float:
    """F1 of the words of two texts."""
    ours, theirs = Counter(words(text)), Counter(words(answer))
    common = (ours & theirs).total()
    return 2 * common / (ours.total() + theirs.total()) if common else 0.0


def toy_model(folder: Path) -> Path:
    """A random Llama with a tokenizer of characters, for runs without downloads."""
    entries = ["<pad>", "<eos>", "<unk>", *map(chr, range(32, 127)), "\n"]
    config: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(entries)}
    config |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder)
    sums.tokenizer(entries).save_pretrained(folder)
    return folder


def rows(smoke: bool, old: Rows, cache: Path) -> Iterator[Row]:
    """The start; every method at every rate on the tuning seed; every method at its rate on the seeds."""
    size = SMOKE if smoke else SIZE
    made = [row for row in old if row["size"] == size]
    ground = Ground(size, cache, smoke)

    def missing(**wanted: Any) -> bool:
        return not any(all(row[k] == v for k, v in wanted.items()) for row in made)

    def finished(row: Row) -> Row:
        made.append(row)
        return row

    if missing(method="start"):
        model = ground.load()
        found = ground.score(model) | {"parameters": sum(p.numel() for p in model.parameters())}
        yield finished({"stage": "score", "method": "start", "rate": None, "seed": None, "size": size} | found)
        del model
    for method in COMPARED:
        for rate in RATES[:1] if smoke else RATES:
            if missing(stage="tune", method=method, rate=rate):
                yield finished(run(ground, "tune", method, rate, TUNING_SEED))
    rates = {method: best_rate(made, method) for method in COMPARED}
    for seed in SEEDS[:1] if smoke else SEEDS:
        for method in COMPARED:
            if missing(stage="score", method=method, rate=rates[method], seed=seed):
                yield finished(run(ground, "score", method, rates[method], seed))


def best_rate(made: Rows, method: str) -> float:
    """The rate with the best pair accuracy on validation; of equals the smaller."""
    tried = [row for row in made if row["stage"] == "tune" and row["method"] == method]
    return max(tried, key=lambda row: (row["pair_accuracy"], -row["rate"]))["rate"]


def run(ground: Ground, stage: str, method: str, rate: float, seed: int) -> Row:
    budget = Budget(ground.size["steps"], ground.size["batch"], rate, seed)
    pairs = qa.preferences(ground.pairs(seed))
    model, seconds = train(method, ground.start, pairs, ground.tokenizer, budget, **SHARED)
    began = time.perf_counter()
    if stage == "tune":
        found = compared(ground.logps(model, ground.validation), ground.before("validation"))
    else:
        found = ground.score(model)
    return {
        "stage": stage,
        "method": method,
        "rate": rate,
        "seed": seed,
        "size": ground.size,
        **found,
        "options": METHODS[method],
        "train_seconds": seconds,
        "score_seconds": time.perf_counter() - began,
    }
