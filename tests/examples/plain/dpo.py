"""The example of the same name, as it is without hf_lowmem."""

import torch
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer

args = DPOConfig(
    "out/dpo",
    learning_rate=5e-7,
    bf16=torch.cuda.is_available(),
)
trainer = DPOTrainer(
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    args=args,
    train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
)
trainer.train()
