"""What a run prints: one block at its start, one at its end, with figures that are those of the run."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_lowmem import LowMemCallback, LowMemTrainer, LowMemTrainingArguments, make_optimizer
from hf_lowmem.memory import free as memory_free
from hf_lowmem.memory import human_bytes
from hf_lowmem.memory.free import free_and_total
from hf_lowmem.optim.resting import rest
from hf_lowmem.runs.said import adamw_parts
from hf_lowmem.specs import OptimSpec
from tests.conftest import tiny_llama
from tests.runs.callback.runs import trainer_of
from tests.runs.cards import OURS, PLAN, plain, reporter, sft
from tests.training.test_trainers import settings, token_data


def blocks(text: str) -> tuple[list[str], list[str]]:
    """The lines of the two blocks."""
    found = re.findall(r"^hf_lowmem[^\n]*(?:\n  [^\n]*)*", text.replace("\r", "\n"), re.MULTILINE)
    start, end = (block.splitlines() for block in found)
    return start, end


def rows(lines: list[str]) -> dict[str, list[str]]:
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines[1:]]
    return {name: rest for name, *rest in cells}


@pytest.mark.train
def test_a_run_says_what_is_on_and_what_it_took(tmp_path: Path, tokenizer: Any, capsys: Any) -> None:
    trainer = sft(tmp_path, tokenizer, lowmem_activations="fp8", eval_strategy="no", max_steps=2)
    trainer.predicted = PLAN
    trainer.train()
    start, end = blocks(capsys.readouterr().out)
    assert re.fullmatch(r"hf_lowmem \S+, LowMemSFTTrainer", start[0])
    said = "\n".join(start)
    for words in (
        "optim=apollo_mini, lowmem_state=int8, lowmem_activations=fp8",
        "fp8 in 1 of 1 layers",
        "parameters, all trained",
        "5.00 KiB predicted",
        " free",
    ):
        assert words in said, words
    measured, found = reporter(trainer).report, rows(end)
    predicted = adamw_parts(trainer.model, trainer.args)
    assert f"{human_bytes(measured['optimizer'])} predicted" in said, "the state is what it was said to be"
    for name, part in (("weights", "weights"), ("gradients", "gradients"), ("optimizer state", "optimizer")):
        assert found[name] == [human_bytes(measured[part]), human_bytes(predicted[part])]
    assert found["saved for backward"] == [human_bytes(measured["saved"]), "not predicted"]
    assert found["peak (process RSS, sampled)"] == [human_bytes(measured["peak"])]
    assert end[0].startswith("hf_lowmem: 2 steps, ")
    assert f"train loss {trainer.state.log_history[-1]['train_loss']:.4g}" in end[0]
    assert str(tmp_path / "lowmem_report.json") in end[-1]


@pytest.mark.train
def test_adamw_beside_is_what_adamw_takes(tmp_path: Path, capsys: Any) -> None:
    """Of weights in two dtypes and one that is frozen, by a training with it."""
    model = tiny_llama(num_hidden_layers=2)
    model.model.layers[0].mlp.to(torch.bfloat16).requires_grad_(False)
    callback = LowMemCallback()
    trainer = trainer_of(tmp_path, callback, model=tiny_llama(), optim="adamw_torch", max_steps=1)
    trainer.train()
    predicted = adamw_parts(trainer.model, trainer.args)  # type: ignore[arg-type]
    assert predicted == {name: callback.report[name] for name in predicted}
    _, end = blocks(capsys.readouterr().out)
    assert rows(end)["saved for backward"][1] == "the same"
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    model.double()(torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    states = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    assert adamw_parts(model, trainer.args)["optimizer"] == states


def test_weights_at_rest_are_whole_beside(tmp_path: Path) -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    before = adamw_parts(model, args)
    rest(OptimSpec(name="adamw", weights="int8_sr"), model)
    assert adamw_parts(model, args) == before


def test_nothing_is_predicted_beside_deepspeed(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    args.deepspeed_plugin = object()  # type: ignore[assignment]
    assert adamw_parts(tiny_llama(), args) == {}


@pytest.mark.train
def test_an_unmodified_trainer_says_which_optimizer_it_was_given(tmp_path: Path, capsys: Any) -> None:
    model = tiny_llama()
    args = settings(TrainingArguments, tmp_path, max_steps=1)
    Trainer(
        model,
        args,
        train_dataset=token_data(),
        callbacks=[LowMemCallback("fp8")],
        optimizers=(make_optimizer("apollo_mini", model, state="8bit"), None),
    ).train()
    start, end = blocks(capsys.readouterr().out)
    found = rows(start)
    assert found["optimizer"][0].startswith("apollo_mini")
    assert found["activations"] == ["fp8 in 1 of 1 layers"]
    assert "predicted" not in "".join(found.get("peak", [])), "no plan, no peak"
    assert len(end) > 6


@pytest.mark.train
@pytest.mark.parametrize("how", ["log_level", "verbose"])
def test_a_run_can_be_silent(tmp_path: Path, capsys: Any, how: str) -> None:
    trainer = plain(tmp_path, **({"log_level": "error"} if how == "log_level" else {}))
    if how == "verbose":
        trainer.add_callback(LowMemCallback(verbose=False))
    trainer.train()
    assert "hf_lowmem" not in capsys.readouterr().out


@pytest.mark.train
def test_words_that_cannot_be_found_end_no_training(tmp_path: Path, caplog: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("hf_lowmem.runs.callback.at_start", lambda *_, **__: 1 / 0)
    assert plain(tmp_path).train().global_step == 1
    assert "what is on could not be said: ZeroDivisionError" in caplog.text


def test_free_memory_is_what_a_run_may_take(monkeypatch: Any) -> None:
    assert free_and_total(torch.device("meta")) == (None, None), "of which nobody says it"
    free, total = free_and_total(torch.device("cpu"))
    assert free is not None
    assert total is not None
    assert 0 < free <= total
    monkeypatch.setattr(memory_free, "left_by_cgroups", lambda: [7])  # a container's limit
    assert free_and_total(torch.device("cpu")) == (7, total)


@pytest.mark.train
@pytest.mark.parametrize("changes", [OURS, OURS | {"lowmem_activations": "checkpoint_fp8"}], ids=["optim", "tier"])
def test_no_warning_of_what_nobody_has_set(tmp_path: Path, recwarn: Any, changes: dict[str, Any]) -> None:
    """transformers' word of an older name of a field is for those who wrote it."""
    args = LowMemTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1, **changes)
    trainer = LowMemTrainer(tiny_llama(), args, train_dataset=token_data())
    trainer.train()
    assert not [str(w.message) for w in recwarn if "gradient_checkpointing" in str(w.message)]
    assert args.gradient_checkpointing is False
