"""A loop of one's own on an Accelerator: the plugin gives back what `accelerator.prepare` would."""

from accelerate import Accelerator
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from hf_lowmem import LowMemPlugin

name = "HuggingFaceTB/SmolLM2-135M-Instruct"
accelerator = Accelerator()
tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name)
data = load_dataset("Trelis/tiny-shakespeare", split="train")
data = data.map(lambda row: tokenizer(row["Text"], truncation=True, max_length=512), remove_columns=data.column_names)
loader = DataLoader(data, batch_size=4, shuffle=True, collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False))
plugin = LowMemPlugin(lowmem="balanced", learning_rate=1e-5)
model, optimizer, loader = plugin.prepare(accelerator, model, loader)
for batch in loader:
    accelerator.backward(model(**batch).loss)
    optimizer.step()
    optimizer.zero_grad()
