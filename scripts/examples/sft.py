"""All weights of a model fine-tuned on conversations: TRL's SFTTrainer, with one line of fields."""

import torch
from datasets import load_dataset
from trl import SFTTrainer

from hf_lowmem import LowMemSFTConfig as SFTConfig

args = SFTConfig(
    "out/sft",
    learning_rate=1e-5,
    bf16=torch.cuda.is_available(),
    lowmem="balanced",
)
trainer = SFTTrainer(
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    args=args,
    train_dataset=load_dataset("trl-lib/Capybara", split="train"),
)
trainer.train()
