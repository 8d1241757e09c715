"""QLoRA: adapters on a model in 4 bits (bitsandbytes), with activations in 8."""

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_lowmem import LowMemSFTConfig, LowMemSFTTrainer

dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
model = AutoModelForCausalLM.from_pretrained(
    "HuggingFaceTB/SmolLM2-135M-Instruct", dtype=dtype, quantization_config=four_bits
)
args = LowMemSFTConfig(
    "out/qlora",
    optim="adamw",
    lowmem_state="8bit",
    lowmem_activations="fp8_recompute",
    learning_rate=2e-4,
    bf16=torch.cuda.is_available(),
)
trainer = LowMemSFTTrainer(
    model,
    args=args,
    train_dataset=load_dataset("trl-lib/Capybara", split="train"),
    peft_config=LoraConfig(r=16, target_modules="all-linear"),
)
trainer.train()
