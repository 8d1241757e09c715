"""The example of the same name, as it is without hf_lowmem."""

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

args = SFTConfig(
    "out/sft",
    learning_rate=1e-5,
    bf16=torch.cuda.is_available(),
)
trainer = SFTTrainer(
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    args=args,
    train_dataset=load_dataset("trl-lib/Capybara", split="train"),
)
trainer.train()
