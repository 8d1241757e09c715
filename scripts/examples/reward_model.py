"""A reward model from pairs, with TRL's RewardTrainer."""

import torch
from datasets import load_dataset
from trl import RewardConfig, RewardTrainer

from hf_lowmem import with_lowmem

args = with_lowmem(RewardConfig)(
    "out/reward_model",
    lowmem="light",
    learning_rate=1e-5,
    bf16=torch.cuda.is_available(),
)
trainer = RewardTrainer(
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    args=args,
    train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
)
trainer.train()
