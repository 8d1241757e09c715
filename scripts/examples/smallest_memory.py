"""The least memory for training all weights: bf16 weights, one factor a matrix, updates during backward."""

import torch
from datasets import load_dataset

from hf_lowmem import LowMemSFTConfig, LowMemSFTTrainer

args = LowMemSFTConfig(
    "out/smallest_memory",
    per_device_train_batch_size=1,
    gradient_accumulation_steps=1,
    lowmem="smallest",
    learning_rate=1e-5,
    bf16=torch.cuda.is_available(),
    model_init_kwargs={"dtype": torch.bfloat16},
)
trainer = LowMemSFTTrainer(
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    args=args,
    train_dataset=load_dataset("trl-lib/Capybara", split="train"),
)
trainer.train()
