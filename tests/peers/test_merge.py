"""Metrics-weighted averaging (arXiv 2504.18580) as a script: shares, the mean of real checkpoints, what is refused."""

import json
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_lowmem import LowMemTrainer, LowMemTrainingArguments
from tests.conftest import tiny_llama
from tests.test_scripts import ROOT
from tests.training.test_trainers import token_data


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import merge_checkpoints  # type: ignore[import-not-found]

    return merge_checkpoints


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    args = LowMemTrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=3, save_steps=1, logging_steps=1,
        learning_rate=1e-2, optim="adamw", eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    model = tiny_llama(dtype=torch.bfloat16, tie_word_embeddings=False)
    LowMemTrainer(model, args, train_dataset=token_data(8), eval_dataset=token_data(4)).train()
    return folder


def folders(run: Path) -> list[Path]:
    return [run / f"checkpoint-{n}" for n in (1, 2, 3)]


def test_shares_are_powers_of_the_metric(script: ModuleType) -> None:
    assert script.shares([2.0, 4.0], 1.0, larger=False) == pytest.approx([2 / 3, 1 / 3])
    assert script.shares([2.0, 4.0], 2.0, larger=True) == pytest.approx([1 / 5, 4 / 5])
    assert script.shares([2.0, 4.0, 9.0], 0.0, larger=False) == pytest.approx([1 / 3] * 3)
    assert sum(script.shares([1e-200, 1e200], 5.0, larger=True)) == 1.0


@pytest.mark.train
def test_the_merged_model_is_the_mean_and_loads(
    script: ModuleType, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    assert script.main([*map(str, folders(run)), "--output", str(out), "--penalty", "3"]) == 0
    rows: list[dict[str, Any]] = json.loads((out / "merge.json").read_text())["merged"]
    losses = [row["eval_loss"] for row in rows]
    assert losses == sorted(losses, reverse=True)  # it learns
    powers = [loss**-3 for loss in losses]
    parts = [power / sum(powers) for power in powers]
    assert [row["share"] for row in rows] == pytest.approx(parts)
    assert "checkpoint-2: eval_loss" in capsys.readouterr().out
    tensors = [load_file(folder / "model.safetensors") for folder in folders(run)]
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    for name, found in model.state_dict().items():
        wanted = sum(part * of[name].double() for part, of in zip(parts, tensors, strict=True))
        assert torch.equal(found, wanted.bfloat16())  # type: ignore[union-attr]
    assert sorted(p.name for p in out.iterdir()) == sorted(
        {"config.json", "merge.json", "model.safetensors", *extra(run)}
    )


def extra(run: Path) -> set[str]:
    return {"generation_config.json"} & {p.name for p in (run / "checkpoint-3").iterdir()}


@pytest.mark.train
def test_what_has_no_mean_is_refused(
    script: ModuleType, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, _ = map(str, folders(run))
    out = ["--output", str(tmp_path / "out")]
    broken = tmp_path / "broken"
    shutil.copytree(one, broken)
    (broken / "model.safetensors").write_bytes(b"x" + (broken / "model.safetensors").read_bytes()[1:])
    cases = [
        ([one, *out], "alone is its own mean"),
        ([one, two, "--output", two], "is there already"),
        ([one, two, *out, "--penalty", "-1"], "--penalty -1.0"),
        ([one, two, *out, "--metric", "accuracy"], "--metric accuracy is not there by step 1.*eval_loss"),
        ([one, str(broken), *out], "model.safetensors"),
    ]
    for arguments, said in cases:
        assert script.main(arguments) == 2
        error = capsys.readouterr().err
        assert re.search(said, error), error
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"w is \(2,\) torch.float32, \(3,\) torch.float32"):
        script.mean([torch.zeros(2), torch.zeros(3)], [0.5, 0.5], "w")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").touch()
    with pytest.raises(ValueError, match="add_weighted_adapter"):
        script.files_by_name(adapter)
