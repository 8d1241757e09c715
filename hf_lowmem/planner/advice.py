"""A learning rate and a batch for pre-training, by the Step law: `hf-lowmem plan --advise 20B`.

Li et al., Predictable Scale I: Step Law (arXiv 2503.04715): of 3,700 Llamas that were trained from nothing with AdamW,
the best peak rate and the best batch follow

    rate = 1.79 N^-0.713 D^0.307        batch = 0.58 D^0.571 tokens

N: parameters without embeddings and output head, D: tokens of the whole run; with a final rate of 1e-5. The constants
were read in two places, the authors' page and a summary by others. Another group's fit on smaller models has another
exponent of D (lucaslingle, Scaling laws for optimal LR and batch size), so take the answer for its order.

When not to use it: for fine-tuning, for which nothing of it was fitted; with another rule than AdamW's; and for
mixtures of experts only with the whole number of their parameters, as the authors count.
"""

from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedConfig

from hf_lowmem.planner.models import meta_model

__all__ = ["Advice", "parse_tokens", "step_law"]

FINAL_RATE = 1e-5
UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Advice:
    """Answer of the Step law: parameters N, tokens D, the peak and the final rate, tokens and sequences of a step."""

    parameters: int
    tokens: int
    learning_rate: float
    final_rate: float
    batch_tokens: int
    sequences: int
    length: int

    def to_dict(self) -> dict[str, float]:
        """Plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """The answer in words."""
        return (
            f"pre-training on {self.tokens:,} tokens, by the Step law (AdamW, from nothing; not for fine-tuning): "
            f"learning_rate={self.learning_rate:.3g} falling to {self.final_rate:g}, {self.batch_tokens:,} tokens a "
            f"step, which are {self.sequences:,} sequences of {self.length:,}; of {self.parameters:,} parameters "
            "without embeddings and head"
        )


def parse_tokens(label: str, value: str) -> int:
    """A number of tokens such as 20B, 300M or 2e10.

    Raises:
        ValueError: for another form, and for what is below one.
    """
    text = value.strip().upper()
    unit = text[-1:] if text[-1:] in UNITS else ""
    try:
        tokens = int(float(text.removesuffix(unit)) * UNITS[unit])
    except (ValueError, OverflowError):
        tokens = 0
    if tokens < 1:
        raise ValueError(f"{label}={value!r}: expected the tokens of the whole training, such as 20B, 300M or 2e10.")
    return tokens


def step_law(config: PreTrainedConfig, tokens: int, length: int) -> Advice:
    """The Step law's advice for a model and so many tokens, in sequences of `length`."""
    model = meta_model(config, torch.bfloat16, None)
    outer = [
        module.weight
        for find in ("get_input_embeddings", "get_output_embeddings")
        if (module := getattr(model, find)())
    ]
    ends = {id(weight) for weight in outer}
    inner = sum(p.numel() for p in model.parameters() if id(p) not in ends)
    batch = round(0.58 * tokens**0.571)
    return Advice(
        parameters=inner,
        tokens=tokens,
        learning_rate=1.79 * inner**-0.713 * tokens**0.307,
        final_rate=FINAL_RATE,
        batch_tokens=batch,
        sequences=max(1, round(batch / length)),
        length=length,
    )
