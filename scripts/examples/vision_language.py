"""A vision-language model fine-tuned on images and words: TRL's SFTTrainer; the language model's layers are handled."""

import torch
from datasets import load_dataset
from trl import SFTTrainer

from hf_lowmem import LowMemSFTConfig as SFTConfig

args = SFTConfig(
    "out/vision_language",
    learning_rate=1e-5,
    bf16=torch.cuda.is_available(),
    per_device_train_batch_size=2,
    max_length=None,  # images are many tokens, and none of them may be cut off
    lowmem="balanced",
)
trainer = SFTTrainer(
    "HuggingFaceTB/SmolVLM-256M-Instruct",
    args=args,
    train_dataset=load_dataset("trl-lib/llava-instruct-mix", split="train"),
)
trainer.train()
