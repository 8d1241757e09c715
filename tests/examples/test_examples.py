"""Every script of scripts/examples, run as it is printed but for names of models and data and the number of steps."""

import copy
import difflib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from PIL import Image
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.conftest import tiny_llama

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "scripts" / "examples").glob("*.py"))
PLAIN = sorted((Path(__file__).parent / "plain").glob("*.py"))
FEW: dict[str, Any] = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 2, "logging_steps": 1}
# What a script needs beside FEW to take a moment.
SHORT = {"grpo": {"per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 8}}
IMAGE = 127  # the token in whose place an image stands
SEEING = (
    "{% for m in messages %}{{ m['role'] }} {% for part in m['content'] %}{% if part['type'] == 'image' %}w123 "
    "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


def said(role: str, i: int) -> list[dict[str, str]]:
    return [{"role": role, "content": f"w{i % 120} w{(i + 1) % 120} w{(i + 2) % 120}"}]


def pairs(i: int) -> dict[str, Any]:
    asked = said("user", i)
    return {"chosen": asked + said("assistant", i + 3), "rejected": asked + said("assistant", 3 * i)}


# A row of each data set that the scripts name, with its columns.
ROWS: dict[str, Any] = {
    "trl-lib/Capybara": lambda i: {"messages": said("user", i) + said("assistant", i + 3)},
    "trl-lib/ultrafeedback_binarized": pairs,
    "trl-lib/ultrafeedback-prompt": lambda i: {"prompt": said("user", i)},
    "trl-lib/kto-mix-14k": lambda i: {
        "prompt": said("user", i), "completion": said("assistant", i + 3), "label": i % 2 == 0,
    },
    "trl-lib/llava-instruct-mix": lambda i: {
        "prompt": said("user", i), "completion": said("assistant", i + 3), "images": [Image.new("RGB", (16, 16))],
    },
    "stanfordnlp/imdb": lambda i: {"text": f"w{i} w{i + 1}", "label": i % 2},
    "Helsinki-NLP/opus_books": lambda i: {"translation": {"en": f"w{i} w{i + 1}", "fr": f"w{i + 2} w{i + 3}"}},
    "Trelis/tiny-shakespeare": lambda i: {"Text": f"w{i} w{i + 1} w{i + 2}"},
}  # fmt: skip


def load_dataset(name: str, *args: Any, split: str) -> Dataset:
    assert split == "train"
    return Dataset.from_list([ROWS[name](i) for i in range(16)])


def models() -> dict[str, Any]:
    """A small model of the architecture of each that the scripts name."""
    torch.manual_seed(0)
    small: Any = {"vocab_size": 128, "num_hidden_layers": 1, "intermediate_size": 96}
    encoder: Any = {"hidden_size": 64, "num_attention_heads": 4, "num_labels": 2}
    both: Any = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
    bert, t5 = BertConfig(**small, **encoder), T5Config(vocab_size=128, **both)
    heads: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    eyes = CLIPVisionConfig(hidden_size=32, image_size=16, patch_size=8, **heads)
    words = LlamaConfig(vocab_size=128, hidden_size=64, **heads)
    sees = LlavaConfig(vision_config=eyes, text_config=words, image_token_index=IMAGE)
    return {
        "HuggingFaceTB/SmolVLM-256M-Instruct": LlavaForConditionalGeneration(sees),
        "HuggingFaceTB/SmolLM2-135M-Instruct": tiny_llama(num_hidden_layers=2),
        "google-bert/bert-base-uncased": BertForSequenceClassification(bert),
        "google-t5/t5-small": T5ForConditionalGeneration(t5),
    }


def processor(tokenizer: Any) -> Any:
    """What makes images and words into a batch, with a word of the tokenizer's in an image's place."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"w{IMAGE - 4}"]})
    tokenizer.image_token = f"w{IMAGE - 4}"
    size = {"height": 16, "width": 16}
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=f"w{IMAGE - 4}",
        chat_template=SEEING,
    )


def run(
    path: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, out: bool = True
) -> dict[str, Any]:
    AcceleratorState._reset_state(reset_partial_state=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    code, few = path.read_text(), FEW | SHORT.get(path.stem, {})
    for name, model in models().items():
        if f'"{name}"' in code:
            folder = tmp_path / "model"
            model.save_pretrained(folder)
            tokenizer.chat_template = TEMPLATE
            made = processor(tokenizer) if path.stem == "vision_language" else tokenizer
            made.save_pretrained(folder)
            code = code.replace(f'"{name}"', repr(str(folder)))
    line = re.compile(r'^    "out/(\w+)",$', re.M)
    assert line.findall(code) == ([path.stem] if out and path.stem != "accelerate_loop" else [])
    code = line.sub(r"\g<0> **FEW,", code)
    names: dict[str, Any] = {"FEW": few}
    exec(compile(code, path.name, "exec"), names)
    return names


@pytest.mark.train
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_trains(path: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run(path, tokenizer, tmp_path, monkeypatch)
    if path.stem == "accelerate_loop":
        assert names["optimizer"].optimizer.param_groups[0]["method"] == "apollo"
        return
    (report,) = json.loads(Path(f"out/{path.stem}/lowmem_report.json").read_text())["trainings"]
    assert report["finished"]
    assert report["to_step"] == 2


@pytest.mark.train
@pytest.mark.parametrize("path", PLAIN, ids=lambda path: path.stem)
def test_a_plain_script_is_ours_by_three_lines(
    path: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script without us runs, too; what makes it ours is at most three lines, changed or new."""
    ours = ROOT / "scripts" / "examples" / path.name
    without, lines = (f.read_text().splitlines()[1:] for f in (path, ours))
    changes = [line for line in difflib.ndiff(without, lines) if line[0] in "+-" and line[2:].strip()]
    assert 0 < len([c for c in changes if c[0] == "+"]) <= 3
    assert len([c for c in changes if c[0] == "-"]) <= 3
    run(path, tokenizer, tmp_path, monkeypatch)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_on_the_list(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 40
    assert f"`{path.name}`" in (path.parent / "README.md").read_text()


@pytest.mark.train
def test_the_notebook_s_cells_run_without_a_gpu(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook = json.loads((ROOT / "scripts" / "examples" / "first_steps.ipynb").read_text())
    assert (notebook["nbformat"], notebook["metadata"]["kernelspec"]["name"]) == (4, "python3")
    assert not [cell for cell in notebook["cells"] if cell.get("outputs")], "as it is before it has run"
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    script = tmp_path / "first_steps.py"
    script.write_text("\n".join(code))
    run(script, tokenizer, tmp_path, monkeypatch, out=False)
    shown = capsys.readouterr().out
    assert shown.count("kept in memory") == 2
    assert "| optimizer state |" in shown
    assert Path("memory.png").read_bytes().startswith(b"\x89PNG")
    assert "`first_steps.ipynb`" in (ROOT / "scripts" / "examples" / "README.md").read_text()
