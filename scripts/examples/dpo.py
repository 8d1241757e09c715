"""DPO, TRL's own loss: the reference's log-probabilities are computed once, then the reference is dropped."""

import torch
from datasets import load_dataset
from trl import DPOTrainer

from hf_lowmem import LowMemDPOConfig as DPOConfig

args = DPOConfig(
    "out/dpo",
    learning_rate=5e-7,
    bf16=torch.cuda.is_available(),
    lowmem="balanced",
)
trainer = DPOTrainer(
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    args=args,
    train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
)
trainer.train()
