"""The example of the same name, as it is without hf_lowmem."""

import torch
from accelerate import Accelerator
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

name = "HuggingFaceTB/SmolLM2-135M-Instruct"
accelerator = Accelerator()
tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name)
data = load_dataset("Trelis/tiny-shakespeare", split="train")
data = data.map(lambda row: tokenizer(row["Text"], truncation=True, max_length=512), remove_columns=data.column_names)
loader = DataLoader(data, batch_size=4, shuffle=True, collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for batch in loader:
    accelerator.backward(model(**batch).loss)
    optimizer.step()
    optimizer.zero_grad()
