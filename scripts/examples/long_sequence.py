"""Sequences of 16,384 tokens: layer inputs alone are kept, in 8 bits, and no logits of a whole sequence are made."""

import torch
from datasets import load_dataset

from hf_lowmem import LowMemSFTConfig, LowMemSFTTrainer

args = LowMemSFTConfig(
    "out/long_sequence",
    max_length=16384,
    packing=True,
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
