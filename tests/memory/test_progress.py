"""Bars on a terminal, lines in a file, and nothing with `disable_tqdm`."""

import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import IterableDataset

from hf_lowmem.memory import progress
from hf_lowmem.memory.progress import counted, others, stages
from hf_lowmem.optim.resting import rest
from hf_lowmem.preference.reference.quantized import quantize_linears
from hf_lowmem.specs import OptimSpec
from tests.conftest import tiny_llama
from tests.planner.test_auto import trainer_of
from tests.training.test_trainers import pair_data


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> pytest.CaptureFixture[str]:
    """What is written to a terminal, where bars need not be waited for."""
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True)  # another object stands there in each phase
    monkeypatch.setattr(progress, "WAIT", 0)
    return capsys


def test_stages_are_a_bar_on_a_terminal(terminal: pytest.CaptureFixture[str]) -> None:
    with stages("plan") as tell:
        for i in range(2):
            tell(f"layer {i}")
    shown = terminal.readouterr().err
    assert "plan: " in shown
    assert "simulations" in shown
    assert shown.endswith("\r"), "the bar is taken away"


def test_stages_are_lines_in_a_file_and_silent_when_they_are_to_be(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with stages("plan") as tell:
        tell("layer 1")
    assert capsys.readouterr().err == "plan: layer 1\n"
    caplog.set_level(logging.INFO, progress.__name__)
    with stages("plan", shown=False) as tell:
        tell("layer 2")
    assert capsys.readouterr().err == ""
    assert caplog.messages == ["plan: layer 2"]


def test_what_is_counted_is_a_bar_on_a_terminal_alone(terminal: pytest.CaptureFixture[str]) -> None:
    assert list(counted(iter("abc"), "letters", total=3)) == ["a", "b", "c"]
    assert "letters: " in terminal.readouterr().err
    assert list(counted("abc", "letters", shown=False)) == ["a", "b", "c"]
    assert terminal.readouterr().err == ""


def test_bars_of_others_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    with others(shown=False):
        assert os.environ["TQDM_DISABLE"]
    assert "TQDM_DISABLE" not in os.environ
    with others(shown=True):
        assert "TQDM_DISABLE" not in os.environ


def test_conversions_have_one(terminal: pytest.CaptureFixture[str]) -> None:
    spec = OptimSpec(name="adamw", weights="int8_sr")
    rest(spec, tiny_llama().to(torch.bfloat16))
    assert "weights=int8_sr: " in terminal.readouterr().err
    rest(spec, tiny_llama().to(torch.bfloat16), shown=False)
    assert terminal.readouterr().err == ""
    quantize_linears(tiny_llama(hidden_size=64), torch.device("cpu"))
    assert "4-bit reference: " in terminal.readouterr().err


@pytest.mark.train
@pytest.mark.parametrize("disabled", [False, True])
def test_a_search_has_one_unless_bars_are_disabled(
    tmp_path: Path, disabled: bool, terminal: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {"lowmem_budget": "1GiB", "disable_tqdm": disabled, "max_length": 24 if disabled else 16}
    trainer_of(tmp_path, **asked)
    assert ("simulations" in terminal.readouterr().err) == (not disabled)


@pytest.mark.train
@pytest.mark.parametrize("disabled", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_pass_for_the_reference_has_one_unless_bars_are_disabled(
    tmp_path: Path, tokenizer: Any, disabled: bool, streamed: bool, terminal: pytest.CaptureFixture[str]
) -> None:
    """TRL's for a data set of rows, ours for a stream."""
    from hf_lowmem import LowMemDPOConfig, LowMemDPOTrainer

    data: Any = pair_data(8)
    if streamed:
        rows = list(data)
        data = IterableDataset.from_generator(lambda: iter(rows))
    args = LowMemDPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1, lowmem_reference="precomputed",
        disable_tqdm=disabled, per_device_train_batch_size=2, save_strategy="no",
    )  # fmt: skip
    trainer = LowMemDPOTrainer(tiny_llama(), args=args, train_dataset=data, processing_class=tokenizer)
    trainer.get_train_dataloader()
    name = "reference log-probabilities: " if streamed else "Computing reference log probs"
    assert (name in terminal.readouterr().err) == (not disabled)
