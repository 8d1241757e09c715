"""KTO: single answers that are good or bad, with TRL's own trainer and reference."""

import torch
from datasets import load_dataset
from trl import KTOConfig, KTOTrainer

from hf_lowmem import with_lowmem

args = with_lowmem(KTOConfig)(
    "out/kto",
    lowmem="light",
    learning_rate=5e-7,
    bf16=torch.cuda.is_available(),
)
trainer = KTOTrainer(
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    args=args,
    train_dataset=load_dataset("trl-lib/kto-mix-14k", split="train"),
)
trainer.train()
