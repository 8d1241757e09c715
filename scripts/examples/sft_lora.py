"""LoRA adapters on a frozen model: the tier is what saves memory here, for adapters have small states."""

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTTrainer

from hf_lowmem import LowMemSFTConfig as SFTConfig

args = SFTConfig(
    "out/sft_lora",
    learning_rate=1e-4,
    bf16=torch.cuda.is_available(),
    lowmem_activations="fp8_recompute",
)
trainer = SFTTrainer(
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    args=args,
    train_dataset=load_dataset("trl-lib/Capybara", split="train"),
    peft_config=LoraConfig(r=16, target_modules="all-linear"),
)
trainer.train()
