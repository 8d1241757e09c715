"""A run whose gradients are bad says so in its log, its warnings and its card, and ends where a field says when."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lowmem import LowMemTrainer, LowMemTrainingArguments, make_optimizer
from hf_lowmem.runs.skips import KEY
from hf_lowmem.training.callbacks import LowMemCallback
from hf_lowmem.training.plugin import LowMemPlugin

COMMON: dict[str, Any] = {
    "use_cpu": True, "report_to": [], "logging_steps": 2, "per_device_train_batch_size": 1, "save_strategy": "no",
    "max_steps": 8, "disable_tqdm": True, "logging_nan_inf_filter": False,
}  # fmt: skip


class Net(nn.Module):
    """Its loss is NaN in the steps that are told to be bad."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, bad: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = self.linear(x).square().mean()
        return {"loss": loss * torch.where(bad.any(), torch.nan, 1.0)}


def rows(*bad: int, count: int = 8) -> list[dict[str, Any]]:
    return [{"x": torch.ones(8), "bad": torch.tensor(i in bad)} for i in range(count)]


class InOrder(LowMemTrainer):
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def trainer_of(folder: Path, data: list[dict[str, Any]], **fields: Any) -> LowMemTrainer:
    merged: dict[str, Any] = COMMON | {"optim": "adamw"} | fields
    args = LowMemTrainingArguments(str(folder), **merged)
    torch.manual_seed(0)
    return InOrder(Net(), args, train_dataset=data)


def logged(trainer: Any) -> list[int | None]:
    return [row.get(KEY) for row in trainer.state.log_history]


@pytest.mark.train
@pytest.mark.parametrize("optim", ["adamw", "apollo_mini", "soap"])
def test_a_run_of_bad_gradients_does_not_end_without_a_word(
    optim: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of(tmp_path, rows(*range(8)), optim=optim)
    before = trainer.model.linear.weight.detach().clone()
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert torch.equal(trainer.model.linear.weight, before)
    assert logged(trainer) == [2, 4, 6, 8, 8]
    said = [r.message for r in caplog.records if "left out updates" in r.message]
    assert len(said) == 4
    assert "8 steps have left out updates so far (16 updates of single parameters), the last 8" in said[-1]
    assert "lower learning_rate" in said[-1]
    assert json.loads((tmp_path / "lowmem_report.json").read_text())["results"]["skipped_steps"] == 8
    assert "| steps that left out updates | 8 |" in (tmp_path / "README.md").read_text()


@pytest.mark.train
def test_a_good_run_says_nothing_of_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of(tmp_path, rows())
    trainer.train()
    assert logged(trainer) == [None] * 5
    assert "left out" not in caplog.text
    assert "left out" not in (tmp_path / "README.md").read_text()
    assert "skipped" not in trainer.optimizer.state_dict()["param_groups"][0]


@pytest.mark.train
@pytest.mark.parametrize(
    ("bad", "limit", "end"),
    [
        (range(8), 1, 1),
        (range(8), 3, 3),
        ((2, 3, 4, 5), 3, 5),
        ((0, 1, 3, 4, 6, 7), 3, 8),  # never three in a row
        ((5, 6, 7), 3, 8),
        ((), 1, 8),
    ],
)
def test_it_ends_after_so_many_in_a_row(
    bad: Any, limit: int, end: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of(tmp_path, rows(*bad), lowmem_max_skipped_steps=limit)
    trainer.train()
    assert trainer.state.global_step == end
    stopped = f"lowmem_max_skipped_steps={limit}: training ends at step {end}" in caplog.text
    assert stopped == (end < 8 or bad == (5, 6, 7))


@pytest.mark.train
def test_the_device_is_asked_no_more_often_than_it_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(tmp_path, rows(1, 2), lowmem_max_skipped_steps=5, logging_strategy="no")
    asked = []
    from hf_lowmem.optim import AdamW

    inner = AdamW.skipped
    monkeypatch.setattr(AdamW, "skipped", lambda self: (asked.append(1), inner(self))[1])
    trainer.train()
    assert 0 < len(asked) <= 4  # at steps 1 and 6, and in the last row of the log


@pytest.mark.train
def test_the_count_survives_a_resume(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "lowmem_max_skipped_steps": 5}
    first = trainer_of(tmp_path, rows(2, 3), max_steps=4, **fields)
    first.train()
    again = trainer_of(tmp_path, rows(2, 3, 4, 5, 6, 7), **fields)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 7, "two steps before the checkpoint, three after it"
    assert [n for n in logged(again) if n] == [2, 4, 5]


@pytest.mark.train
def test_step_in_backward_counts_too(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"lowmem_step_in_backward": True, "max_grad_norm": 0.0, "lowmem_max_skipped_steps": 2}
    trainer = trainer_of(tmp_path, rows(1, 3, 4, 5), **fields)
    trainer.train()
    assert trainer.state.global_step == 5
    assert trainer.optimizer.optimizer.skipped() == (6, 3, 2)


@pytest.mark.train
def test_an_unmodified_trainer_with_a_callback_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen = []

    class Logger(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kw: Any) -> None:
            seen.append(logs.get(KEY))

    torch.manual_seed(0)
    model = Net()
    optimizer = make_optimizer("adamw", model)
    args = TrainingArguments(str(tmp_path), **COMMON)
    callbacks = [LowMemCallback(verbose=False), Logger()]
    data: Any = rows(*range(8))
    trainer = Trainer(model, args, train_dataset=data, optimizers=(optimizer, None), callbacks=callbacks)
    trainer.train()
    assert logged(trainer) == seen == [2, 4, 6, 8, 8]
    assert "left out updates" in caplog.text


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"lowmem_max_skipped_steps": 0}, ValueError, "lowmem_max_skipped_steps=0: must be at least 1"),
        ({"lowmem_max_skipped_steps": -3}, ValueError, "lowmem_max_skipped_steps=-3"),
        ({"lowmem_max_skipped_steps": 2.5}, TypeError, "expected an integer"),
        ({"lowmem_max_skipped_steps": True}, TypeError, "expected an integer"),
        ({"lowmem_max_skipped_steps": 5, "optim": "adamw_torch"}, ValueError, "no effect with optim='adamw_torch'"),
    ],
)
def test_a_bad_limit_is_refused(fields: dict[str, Any], error: type[Exception], match: str, tmp_path: Path) -> None:
    merged: dict[str, Any] = COMMON | {"optim": "adamw"} | fields
    with pytest.raises(error, match=match):
        LowMemTrainingArguments(str(tmp_path), **merged)
    good = LowMemTrainingArguments(str(tmp_path), **COMMON, optim="adamw")
    with pytest.raises(error, match=match):
        good.lowmem_replace(**fields)


def test_a_loop_of_ones_own_is_told_what_to_ask() -> None:
    with pytest.raises(ValueError, match=r"no effect in LowMemPlugin.*optimizer\.skipped\(\)"):
        LowMemPlugin(optim="adamw", lowmem_max_skipped_steps=3)
