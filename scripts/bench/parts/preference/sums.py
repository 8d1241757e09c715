"""Two-digit addition: data, tokenizer and model of the collapse runs, and what is measured on them.

Every prompt has one right answer, so a model's answers can be marked without a judge, and its own wrong answers are
rejected ones that it finds likely: the setting in which a loss that only compares can push both answers down.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = ("<pad>", "<eos>", "<unk>", *"0123456789+=")
PAD, EOS = 0, 1
ANSWER_TOKENS = 4  # three digits and the end


@dataclass(frozen=True)
class Sum:
    """`a + b`; prompt "17+25=", answer "42"."""

    a: int
    b: int

    @property
    def prompt(self) -> str:
        return f"{self.a}+{self.b}="

    @property
    def answer(self) -> str:
        return str(self.a + self.b)


@dataclass(frozen=True)
class Pair:
    """A sum, and a wrong answer to it."""

    sum: Sum
    wrong: str


def tokenizer(vocabulary: Sequence[str] = VOCABULARY) -> PreTrainedTokenizerFast:
    """One token a character."""
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(vocabulary)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def split(sizes: Sequence[int], seed: int) -> list[list[Sum]]:
    """Disjoint random parts, of these sizes, of the 8,100 sums of two numbers from 10 to 99."""
    every = [Sum(a, b) for a in range(10, 100) for b in range(10, 100)]
    if sum(sizes) > len(every):
        raise ValueError(f"sizes={list(sizes)} add up to {sum(sizes)}: there are {len(every)} sums.")
    random.Random(seed).shuffle(every)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [every[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def answered(sums: Sequence[Sum]) -> Dataset:
    """Columns prompt and completion, for SFT."""
    return Dataset.from_dict({"prompt": [s.prompt for s in sums], "completion": [s.answer for s in sums]})


def preferences(pairs: Sequence[Pair]) -> Dataset:
    """Columns prompt, chosen (right) and rejected (the model's own)."""
    return Dataset.from_dict(
        {
            "prompt": [p.sum.prompt for p in pairs],
            "chosen": [p.sum.answer for p in pairs],
            "rejected": [p.wrong for p in pairs],
        }
    )


def build_model(hidden: int, layers: int, seed: int) -> Any:
    config: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": len(VOCABULARY),
        "max_position_embeddings": 32,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**config))


def encode(texts: Sequence[str]) -> Tensor:
    """(len(texts), T) ids of texts of one length."""
    return torch.tensor([[VOCABULARY.index(c) for c in text] for text in texts])


def decode(ids: Tensor) -> list[str]:
    """The text of each row up to its end token; None of the special tokens counts as text."""
    texts = []
    for row in ids.tolist():
        end = row.index(EOS) if EOS in row else len(row)
        texts.append("".join(VOCABULARY[i] if i > 2 else "?" for i in row[:end]))
    return texts


@torch.no_grad()
def answers(model: Any, sums: Sequence[Sum], *, generator: torch.Generator | None = None) -> list[str]:
    """The model's answer to each sum: the likeliest token each time, or with `generator` a sample of its
    distribution."""
    model.eval()
    ids = encode([s.prompt for s in sums])
    start = ids.shape[1]
    for _ in range(ANSWER_TOKENS):
        logits = model(input_ids=ids, use_cache=False).logits[:, -1].float()
        if generator is None:
            token = logits.argmax(dim=-1, keepdim=True)
        else:
            token = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
        ids = torch.cat([ids, token], dim=1)
    return decode(ids[:, start:])


def exact_match(model: Any, sums: Sequence[Sum]) -> float:
    """Share of the sums whose greedy answer is right, to the last character and ended there."""
    return sum(got == s.answer for got, s in zip(answers(model, sums), sums, strict=True)) / len(sums)


def wrong_answers(model: Any, sums: Sequence[Sum], *, draws: int, seed: int) -> list[Pair]:
    """For each sum the first wrong answer among `draws` samples of the model; sums without one are left out."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[Sum, Pair] = {}
    for _ in range(draws):
        left = [s for s in sums if s not in found]
        if not left:
            break
        for s, got in zip(left, answers(model, left, generator=generator), strict=True):
            if got and got != s.answer and "?" not in got:
                found[s] = Pair(s, got)
    return [found[s] for s in sums if s in found]


@torch.no_grad()
def completion_logps(model: Any, prompts: Sequence[str], completions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(sums, tokens): log-probability of each completion and its end token, in nats, and how many tokens that are."""
    model.eval()
    ids = torch.full((len(prompts), len(prompts[0]) + ANSWER_TOKENS + 1), PAD)
    scored = torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        whole = [*encode([prompt + completion])[0].tolist(), EOS]
        ids[row, : len(whole)] = torch.tensor(whole)
        scored[row, len(prompt) : len(whole)] = True
    logps = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(dim=-1)
    logps = logps.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (logps * scored[:, 1:]).sum(dim=1), scored[:, 1:].sum(dim=1)


def pair_logps(model: Any, pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """Sums and lengths of the right and of the wrong answers, (len(pairs),) each."""
    prompts = [p.sum.prompt for p in pairs]
    chosen, chosen_len = completion_logps(model, prompts, [p.sum.answer for p in pairs])
    rejected, rejected_len = completion_logps(model, prompts, [p.wrong for p in pairs])
    return {"chosen": chosen, "rejected": rejected, "chosen_len": chosen_len, "rejected_len": rejected_len}
