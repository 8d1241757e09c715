"""A card says nothing that is not so, and its metadata are what the hub takes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from hf_lowmem.runs.card import whole_card
from hf_lowmem.runs.facts import dataset_name
from hf_lowmem.runs.mended import FOLDER, mended
from hf_lowmem.runs.report import read_report
from tests.conftest import tiny_llama
from tests.runs.cards import dpo, made_up, plain, sft

NOT_SO = ("None", "your_org", "Undefined", "{{ ", "{%")


def checked(path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelCardData:
    """The metadata of a card: well-formed, of the types that the hub reads, and taken by huggingface_hub's check."""
    text = path.read_text(encoding="utf-8")
    header = yaml.safe_load(text.split("---\n")[1])
    assert all(value is not None for value in header.values())
    for name in ("base_model", "datasets"):
        values = header.get(name) or []
        for value in [values] if isinstance(values, str) else values:
            validate_repo_id(value)
    assert isinstance(header["tags"], list)
    assert all(isinstance(tag, str) and 0 < len(tag) <= 96 for tag in header["tags"])
    assert header["library_name"] in ("transformers", "peft")
    assert isinstance(header["model_name"], str)
    assert "license" not in header, "nobody has said one"
    sent: list[dict[str, Any]] = []

    def post(url: str, *, json: dict[str, Any], **_: Any) -> Any:
        sent.append(json)
        return SimpleNamespace(raise_for_status=lambda: None, headers={}, status_code=200, content=b"{}")

    monkeypatch.setattr("huggingface_hub.repocard.get_session", lambda: SimpleNamespace(post=post))
    card: Any = ModelCard.load(path)
    card.validate()
    assert sent[0]["repoType"] == "model"
    assert yaml.safe_load(sent[0]["content"].split("---\n")[1]) == header
    return card.data


def from_folder(trainer: Any, folder: Path, tokenizer: Any) -> None:
    """Let a trainer's model be one that was loaded from a folder."""
    tiny_llama().save_pretrained(folder)
    trainer.model.config._name_or_path = str(folder)


@pytest.mark.train
def test_a_model_of_a_folder_is_called_so(tmp_path: Path, tokenizer: Any, monkeypatch: Any) -> None:
    trainer = sft(tmp_path / "out", tokenizer, max_steps=1)
    from_folder(trainer, tmp_path / "mine", tokenizer)
    trainer.train()
    path = tmp_path / "out" / "README.md"
    text = path.read_text()
    assert "fine-tuned version of `mine`, a model from a folder" in text
    assert f'pipeline("text-generation", model="{FOLDER}"' in text
    for word in NOT_SO:
        assert word not in text, word
    data = checked(path, monkeypatch)
    assert getattr(data, "base_model", None) is None, "a folder is no name on the hub"
    assert "\n\n\n" not in text


@pytest.mark.train
def test_a_model_made_in_memory_and_the_loss_that_was_trained(tmp_path: Path, tokenizer: Any, monkeypatch: Any) -> None:
    dpo(tmp_path, tokenizer).train()
    text = (tmp_path / "README.md").read_text()
    paper = "[arXiv 2409.10571](https://huggingface.co/papers/2409.10571)"
    assert f"This model was trained with ASFT ({paper}), by TRL's DPOTrainer." in text
    assert "fine-tuned version of a model that was made in memory" in text
    assert "Cite DPO as" not in text
    assert "rafailov" not in text
    assert "vonwerra2020trl" in text, "the rest of the citations stays"
    assert {"asft", "dpo", "trl"} <= set(checked(tmp_path / "README.md", monkeypatch).tags or [])


@pytest.mark.train
def test_dpo_stays_dpo_and_a_sum_is_both(tmp_path: Path, tokenizer: Any) -> None:
    dpo(tmp_path / "a", tokenizer, loss_type="sigmoid").train()
    text = (tmp_path / "a" / "README.md").read_text()
    assert "trained with DPO, a method introduced in" in text
    assert "Cite DPO as" in text
    both = mended(text, model=None, losses=["sigmoid", "orpo"])
    assert "trained with DPO (sigmoid) and ORPO ([arXiv 2403.07691]" in both
    assert "Cite DPO as" in both
    assert mended(both, model=None, losses=["sigmoid", "orpo"]) == both


@pytest.mark.train
def test_the_template_s_card_of_a_folder(tmp_path: Path, monkeypatch: Any) -> None:
    trainer = plain(tmp_path / "out")
    from_folder(trainer, tmp_path / "mine", None)
    trainer.train()
    assert getattr(checked(tmp_path / "out" / "README.md", monkeypatch), "base_model", None) is None
    report = read_report(tmp_path / "out")
    assert report["model"]["folder"] is True
    assert "A fine-tuned version of mine, trained on" in whole_card(report)


def test_a_name_on_the_hub_is_the_base(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "README.md").write_text(whole_card(made_up()))
    assert checked(tmp_path / "README.md", monkeypatch).base_model == "org/Tiny"


@pytest.mark.parametrize(
    ("info", "name"),
    [
        ({"download_checksums": {"hf://datasets/trl-lib/Capybara@abc/data/x.parquet": {}}}, "trl-lib/Capybara"),
        ({"download_checksums": {"/home/me/train.jsonl": {}}, "dataset_name": "json"}, None),
        ({"download_checksums": None, "dataset_name": "imdb"}, "imdb"),
        ({}, None),
    ],
)
def test_data_are_called_as_on_the_hub(info: dict[str, Any], name: str | None) -> None:
    assert dataset_name(SimpleNamespace(info=SimpleNamespace(**info))) == name
