"""GRPO with a reward of one's own. Any config of TRL's takes the fields, and its trainer applies them."""

import torch
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

from hf_lowmem import with_lowmem


def reward(completions, **kwargs):
    """The more different words, the better."""
    return [float(len(set(completion[0]["content"].split()))) for completion in completions]


args = with_lowmem(GRPOConfig)(
    "out/grpo",
    lowmem="light",
    learning_rate=1e-6,
    bf16=torch.cuda.is_available(),
)
trainer = GRPOTrainer(
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    reward,
    args=args,
    train_dataset=load_dataset("trl-lib/ultrafeedback-prompt", split="train"),
)
trainer.train()
