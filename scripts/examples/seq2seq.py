"""Translation with an encoder-decoder and transformers' Seq2SeqTrainer."""

import torch
from datasets import load_dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from hf_lowmem import with_lowmem

name = "google-t5/t5-small"
tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForSeq2SeqLM.from_pretrained(name)


def encode(row):
    pair = row["translation"]
    return tokenizer("translate English to French: " + pair["en"], text_target=pair["fr"], truncation=True)


data = load_dataset("Helsinki-NLP/opus_books", "en-fr", split="train").map(encode, remove_columns="translation")
args = with_lowmem(Seq2SeqTrainingArguments)(
    "out/seq2seq",
    lowmem="light",
    learning_rate=1e-4,
    bf16=torch.cuda.is_available(),
)
trainer = Seq2SeqTrainer(model, args, train_dataset=data, data_collator=DataCollatorForSeq2Seq(tokenizer, model))
trainer.train()
