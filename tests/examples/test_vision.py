"""The vision-language example on the classes that SmolVLM's checkpoints name, beside LLaVA's in test_examples.py."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from tests.examples import test_examples as examples

WORDS = (
    "{% for m in messages %}{{ m['role'] }} {% for part in m['content'] %}{% if part['type'] == 'image' %}<image> "
    "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)
VOCABULARY = 136  # with the tokens around an image
SIZE = 16


def processor(tokenizer: Any) -> Any:
    edge = {"longest_edge": SIZE}
    images = Idefics3ImageProcessor(do_image_splitting=False, size=edge, max_image_size=edge)
    return Idefics3Processor(images, copy.deepcopy(tokenizer), image_seq_len=1, chat_template=WORDS)


@pytest.mark.train
@pytest.mark.parametrize(
    ("config", "model"),
    [
        pytest.param(Idefics3Config, Idefics3ForConditionalGeneration, marks=pytest.mark.slow),
        (SmolVLMConfig, SmolVLMForConditionalGeneration),
    ],
    ids=["idefics3", "smolvlm"],
)
def test_the_example_trains_and_handles_the_language_model_s_layers(
    config: Any, model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    heads: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    words = LlamaConfig(vocab_size=VOCABULARY, hidden_size=64, pad_token_id=0, **heads)
    eyes: dict[str, Any] = {"hidden_size": 32, "image_size": SIZE, "patch_size": 8, **heads}
    image = processor(tokenizer).image_token_id
    made = model(config(vision_config=eyes, text_config=words.to_dict(), scale_factor=2, image_token_id=image))
    monkeypatch.setattr(examples, "models", lambda: {"HuggingFaceTB/SmolVLM-256M-Instruct": made})
    monkeypatch.setattr(examples, "processor", processor)
    path = next(path for path in examples.EXAMPLES if path.stem == "vision_language")
    names = examples.run(path, tokenizer, tmp_path, monkeypatch)
    (report,) = json.loads(Path("out/vision_language/lowmem_report.json").read_text())["trainings"]
    assert report["finished"]
    handled = {layer.name: layer.tier for layer in names["trainer"].activations.layers}
    assert list(handled.values()) == ["checkpoint_fp8"] * 2
    assert all("text_model" in name for name in handled)
