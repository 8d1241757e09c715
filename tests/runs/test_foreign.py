"""A run of plain TRL beside one of ours, in a table and in a picture."""

from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_lowmem.cli.main import main
from hf_lowmem.runs.foreign import memory_of_files, model_of_files, versions_of_card
from hf_lowmem.runs.plot import draw, draw_memory
from hf_lowmem.runs.report import read_report
from tests.conftest import tiny_llama
from tests.runs.cards import made_up, sft
from tests.training.test_trainers import settings, token_data

MIB = 2**20
RSS, CUDA = "process RSS, sampled", "cuda allocator"


@pytest.mark.train
def test_a_plain_run_has_the_sizes_of_its_files(tmp_path: Path, tokenizer: Any, capsys: Any) -> None:
    model, data = tiny_llama(), token_data()
    args = settings(SFTConfig, tmp_path / "plain", max_steps=2, save_steps=2, save_strategy="steps", max_length=16)
    trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    report = read_report(tmp_path / "plain")
    (training,) = report["trainings"]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    states: Any = trainer.optimizer.state_dict()["state"].values()  # type: ignore[union-attr]
    assert training["memory"]["weights"] == weights
    assert training["memory"]["optimizer"] == sum(t.nbytes for state in states for t in state.values())
    assert report["model"] == {"parameters": weights // 4, "dtype": "float32"}
    sft(tmp_path / "ours", tokenizer, max_steps=2, eval_strategy="no").train()
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "plain"), str(tmp_path / "ours")]) == 0
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if line.startswith("| optimizer state"))
    assert "not measured" not in row
    assert "plain: no report of hf_lowmem" in shown.splitlines()[-1]
    assert "MemoryReportCallback().add_to(trainer)" in shown


@pytest.mark.train
def test_a_checkpoint_of_plain_trl_is_refused_with_a_way_on(tmp_path: Path, tokenizer: Any) -> None:
    args = settings(TrainingArguments, tmp_path, max_steps=2, save_steps=2, save_strategy="steps")
    Trainer(tiny_llama(), args, train_dataset=token_data()).train()
    ours = sft(tmp_path / "ours", tokenizer)
    with pytest.raises(ValueError, match=r"made without hf_lowmem's optimizers.*take the checkpoint's folder as the"):
        ours.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_files_that_say_nothing(tmp_path: Path) -> None:
    assert memory_of_files(tmp_path) == model_of_files(tmp_path) == versions_of_card(tmp_path) == {}
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 4)
    (tmp_path / "optimizer.pt").write_bytes(b"no archive")
    (tmp_path / "README.md").write_bytes(b"\xff")
    assert memory_of_files(tmp_path) == model_of_files(tmp_path) == versions_of_card(tmp_path) == {}
    save_file({"a": torch.zeros(2, 3, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    (tmp_path / "README.md").write_text("- TRL: 1.16.0\n- Pytorch: 2.13.0+cpu\n")
    assert memory_of_files(tmp_path) == {"weights": 12}
    assert model_of_files(tmp_path) == {"parameters": 6, "dtype": "bfloat16"}
    assert versions_of_card(tmp_path) == {"trl": "1.16.0", "torch": "2.13.0+cpu"}


def drawn(*memories: dict[str, Any]) -> Any:
    axes = Figure().subplots()
    draw_memory(axes, [(f"run {i}", memory) for i, memory in enumerate(memories)])
    return axes


def texts(axes: Any) -> str:
    return "\n".join(text.get_text() for text in axes.texts)


@pytest.mark.parametrize(("source", "peak", "flat"), [(RSS, 700, True), (RSS, 20, False), (CUDA, 700, False)])
def test_bars_are_not_flattened_by_what_is_no_part_of_them(source: str, peak: int, flat: bool) -> None:
    parts = {"weights": 4 * MIB, "gradients": 4 * MIB, "optimizer": 2 * MIB, "saved": 0}
    axes = drawn(parts | {"peak": peak * MIB, "peak_source": source}, parts)
    assert (axes.get_ylim()[1] < 15) == flat
    assert ("whole process\n700.00 MiB" in texts(axes)) == flat
    assert axes.get_ylabel() == "MiB"
    assert "less is better" in axes.get_title()


def test_what_was_not_measured_is_written_there() -> None:
    axes = drawn({"weights": 3 * 2**30, "optimizer": 6 * 2**30}, {})
    assert "not measured:\ngradients,\nsaved for backward" in texts(axes)
    assert axes.get_ylabel() == "GiB"


def test_a_run_without_logged_losses_is_in_the_picture(tmp_path: Path, monkeypatch: Any) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    draw({"a": made_up(), "b": made_up(history=[])}, tmp_path / "x.svg")
    legend = figures[0].axes[1].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b: no loss was logged"]
    assert figures[0].get_facecolor() == (1.0, 1.0, 1.0, 1.0), "white, on dark pages too"
    assert "lower is better" in figures[0].axes[1].get_title()
