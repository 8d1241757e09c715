"""Classification with an encoder and transformers' plain Trainer."""

import torch
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer

from hf_lowmem import LowMemTrainingArguments as TrainingArguments

name = "google-bert/bert-base-uncased"
tokenizer = AutoTokenizer.from_pretrained(name)
data = load_dataset("stanfordnlp/imdb", split="train").shuffle(seed=0)
data = data.map(lambda row: tokenizer(row["text"], truncation=True, max_length=256), remove_columns="text")
args = TrainingArguments(
    "out/classification",
    learning_rate=2e-5,
    bf16=torch.cuda.is_available(),
    lowmem="light",
)
trainer = Trainer(
    AutoModelForSequenceClassification.from_pretrained(name, num_labels=2),
    args,
    train_dataset=data,
    processing_class=tokenizer,
)
trainer.train()
