"""ORPO: preference training without a reference model; each pair's prompt runs once."""

import torch
from datasets import load_dataset

from hf_lowmem import LowMemDPOConfig, LowMemDPOTrainer

args = LowMemDPOConfig(
    "out/orpo",
    loss_type="orpo",
    lowmem="balanced",
    lowmem_share_prompt=True,
    learning_rate=1e-6,
    bf16=torch.cuda.is_available(),
)
trainer = LowMemDPOTrainer(
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    args=args,
    train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
)
trainer.train()
