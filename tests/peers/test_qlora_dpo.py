"""QLoRA, then DPO, in one command: what is merged, what DPO starts from, what is refused."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import tiny_llama
from tests.test_scripts import ROOT, SMALL
from tests.test_scripts import model_and_data as files

__all__ = ["files"]  # a fixture is found by its name here
QLORA = ["--load_in_4bit", "--use_peft", "--lora_target_modules", "q_proj", "down_proj", "--lora_r", "4"]


@pytest.fixture
def model_and_data(files: tuple[str, str]) -> tuple[str, str]:
    """bitsandbytes' layout for CPUs is of rows of whole blocks of 64."""
    tiny_llama(intermediate_size=128).save_pretrained(files[0])
    return files


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("train_qlora_dpo")


def go(script: Any, model_and_data: tuple[str, str], out: Path, *flags: str) -> int:
    model, data = model_and_data
    where = ["--model_name_or_path", model, "--dataset_name", data, "--output_dir", str(out), *SMALL]
    more = ["--learning_rate", "1e-2", "--logging_steps", "1", "--save_steps", "1", *flags]
    return script.train(
        script.LowMemDPOConfig, script.LowMemDPOTrainer, script.QuantisedStage, arguments=[*where, *more]
    )


@pytest.mark.train
def test_both_stages_in_one_command(script: Any, model_and_data: tuple[str, str], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "out"
    assert go(script, model_and_data, out, *QLORA, "--sft_epochs", "1", "--sft_learning_rate", "1e-2") == 0
    plain = AutoModelForCausalLM.from_pretrained(model_and_data[0])
    merged = AutoModelForCausalLM.from_pretrained(out / "sft")
    adapted: Any = PeftModel.from_pretrained(plain, str(out / "sft" / "adapter"))
    ids = torch.arange(3, 19)[None]
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-5, rtol=1e-4)
    before = dict(tiny_llama(intermediate_size=128).named_parameters())
    moved = {n for n, p in merged.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "q_proj" in n or "down_proj" in n}
    assert not hasattr(merged.config, "quantization_config")
    saved = json.loads((out / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(out / "sft")
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    margins = [row["rewards/margins"] for row in state["log_history"] if "rewards/margins" in row]
    assert margins[0] == 0, "the policy is its reference when DPO begins"
    assert margins[1] != 0
    first = load_file(out / "adapter_model.safetensors")
    assert go(script, model_and_data, out, *QLORA, "--resume_from_checkpoint", str(out / "checkpoint-1")) == 0
    second = load_file(out / "adapter_model.safetensors")
    assert {t.dtype for t in first.values()} == {torch.bfloat16}, "as TRL trains adapters on 4 bits"
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_is_not_qlora_is_refused(
    script: Any, model_and_data: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, said in (
        ([], "needs --load_in_4bit, --use_peft"),
        (QLORA[1:], "needs --load_in_4bit. Add it"),
        ([*QLORA, "--sft_first", "False"], "needs --sft_first True"),
        ([*QLORA, "--resume_from_checkpoint", str(tmp_path / "checkpoint-1")], "started, is not there"),
    ):
        assert go(script, model_and_data, tmp_path / "out", *flags) == 2
        assert said in capsys.readouterr().err
