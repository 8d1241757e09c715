"""What the Trainer's loggers are handed, by callbacks that stand where W&B's and TensorBoard's do."""

from typing import Any

import pytest
from transformers import TrainerCallback, TrainerState

from hf_lowmem import LowMemCallback, LowMemTrainer, LowMemTrainingArguments, MemoryReportCallback
from hf_lowmem.runs.report import read_report
from hf_lowmem.training.callbacks import MemoryReportCallback as FromCallbacks
from tests.runs.callback.runs import data, llama, nothing_is_left, trainer_of

PARTS = ("weights", "trainable", "gradients", "optimizer", "saved")
PEAK = {"lowmem/peak_rss_gib", "lowmem/peak_rss_added_gib"}


class Logger(TrainerCallback):
    """Keeps what a logger would send, as it is at that moment."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.rows.append((state.global_step, dict(logs or {})))

    def memory(self) -> list[tuple[int, dict[str, float]]]:
        return [(step, {k: v for k, v in row.items() if k.startswith("lowmem/")}) for step, row in self.rows]


@pytest.mark.train
def test_loggers_of_an_unmodified_trainer_get_parts_and_peak_in_gib(tmp_path):
    logger = Logger()
    trainer = trainer_of(tmp_path, logger)
    callback = MemoryReportCallback(verbose=False).add_to(trainer)
    trainer.train()
    first, second, third, last = logger.memory()
    parts = {f"lowmem/{name}_gib": callback.report[name] / 2**30 for name in PARTS}
    assert first[0] == 1
    assert {k: v for k, v in first[1].items() if k not in PEAK} == parts
    assert set(first[1]) == set(last[1]) == set(parts) | PEAK
    assert set(second[1]) == set(third[1]) == PEAK, "a step that was not measured has nothing new but its peak"
    peaks = [row["lowmem/peak_rss_gib"] for _, row in logger.memory()]
    assert peaks == sorted(peaks)
    assert 0 < peaks[-1] <= callback.report["peak"] / 2**30
    assert all("loss" in row or "train_runtime" in row for _, row in logger.rows), "no row of our own"


@pytest.mark.train
def test_a_logger_before_the_callback_sees_nothing_and_the_history_has_it_anyway(tmp_path):
    early, late = Logger(), Logger()
    trainer = trainer_of(tmp_path, early, LowMemCallback(verbose=False), late)
    trainer.train()
    assert not any(row for _, row in early.memory())
    assert all(row for _, row in late.memory())
    assert "lowmem/saved_gib" in trainer.state.log_history[0]


def test_add_to_moves_a_callback_and_adds_none_twice(tmp_path):
    callback = LowMemCallback(verbose=False)
    trainer = trainer_of(tmp_path, callback)
    assert callback.add_to(trainer) is callback
    assert trainer.callback_handler.callbacks[0] is callback
    assert trainer.callback_handler.callbacks.count(callback) == 1
    assert FromCallbacks is MemoryReportCallback


@pytest.mark.train
def test_every_and_parts_go_together(tmp_path):
    logger = Logger()
    trainer = trainer_of(tmp_path, logger, max_steps=5, logging_steps=1)
    MemoryReportCallback(every=2, verbose=False).add_to(trainer)
    trainer.train()
    assert [step for step, row in logger.memory() if "lowmem/saved_gib" in row] == [1, 3, 5, 5]


@pytest.mark.train
def test_a_measured_step_is_told_with_the_next_row(tmp_path):
    logger = Logger()
    trainer = trainer_of(tmp_path, logger, max_steps=3, logging_steps=2)
    MemoryReportCallback(verbose=False).add_to(trainer)
    trainer.train()
    assert [step for step, row in logger.memory() if "lowmem/saved_gib" in row] == [2, 3]


def test_without_any_row_the_history_gets_one(tmp_path):
    trainer = trainer_of(tmp_path)
    callback = MemoryReportCallback(verbose=False)
    args, state, control = trainer.args, trainer.state, trainer.control
    callback.on_train_begin(args, state, control, model=trainer.model)
    callback.on_step_begin(args, state, control, model=trainer.model)
    state.global_step += 1
    callback.on_step_end(args, state, control, model=trainer.model)
    callback.on_train_end(args, state, control)
    assert state.log_history[-1]["lowmem/weights_gib"] * 2**30 == callback.report["weights"]


@pytest.mark.train
def test_evaluation_returns_its_own_metrics_alone(tmp_path):
    trainer = trainer_of(tmp_path)
    MemoryReportCallback(verbose=False).add_to(trainer)
    trainer.train()
    assert not [name for name in trainer.evaluate() if "memory" in name]


@pytest.mark.train
def test_the_states_file_loads_with_the_numbers(tmp_path):
    trainer = trainer_of(tmp_path, LowMemCallback(verbose=False))
    trainer.train()
    trainer.save_state()
    loaded = TrainerState.load_from_json(str(tmp_path / "trainer_state.json"))
    assert loaded.log_history == trainer.state.log_history
    assert {f"lowmem/{name}_gib" for name in PARTS} <= set(loaded.log_history[0])


def test_a_compiled_model_is_not_traced_with_hooks(tmp_path):
    trainer, callback, model = trainer_of(tmp_path), MemoryReportCallback(verbose=False), llama()
    trainer.args.torch_compile = True
    callback.on_step_begin(trainer.args, trainer.state, trainer.control, model=model)
    assert nothing_is_left(model)
    callback.on_train_end(trainer.args, trainer.state, trainer.control)


def ours(tmp_path, *callbacks: Any, **changes: Any) -> Any:
    settings: dict[str, Any] = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    settings |= {"max_steps": 1, "logging_steps": 1, "optim": "apollo_mini", "per_device_train_batch_size": 2}
    args = LowMemTrainingArguments(str(tmp_path), **(settings | changes))
    return LowMemTrainer(model=llama(), args=args, train_dataset=data(4), callbacks=list(callbacks))


def reporters(trainer: Any) -> list[MemoryReportCallback]:
    return [c for c in trainer.callback_handler.callbacks if isinstance(c, MemoryReportCallback)]


@pytest.mark.train
def test_our_trainers_report_unasked_and_leave_the_logs_alone(tmp_path, capsys):
    logger = Logger()
    trainer = ours(tmp_path, logger)
    assert not reporters(trainer)
    trainer.train()
    result = trainer.train()
    (reporter,) = reporters(trainer)
    assert trainer.callback_handler.callbacks[0] is reporter
    assert read_report(tmp_path)["trainings"][0]["memory"]["saved"] == reporter.report["saved"] > 0
    assert not any(row for _, row in logger.memory())
    assert not [name for row in [result.metrics, *trainer.state.log_history] for name in row if "mem" in name]
    assert capsys.readouterr().out.count("kept in memory") == 2, "each training says at its end what it took"


@pytest.mark.train
@pytest.mark.parametrize("late", [False, True])
def test_the_users_callback_takes_the_place_of_ours(tmp_path, late):
    mine, logger = LowMemCallback(every=1, verbose=False), Logger()
    trainer = ours(tmp_path, logger) if late else ours(tmp_path, logger, mine)
    if late:
        trainer.train()
        trainer.add_callback(mine)
    trainer.train()
    assert reporters(trainer) == [mine]
    assert logger.memory()[-1][1]["lowmem/saved_gib"] == mine.report["saved"] / 2**30


@pytest.mark.train
def test_reports_can_be_switched_off(tmp_path):
    trainer = ours(tmp_path)
    trainer.reports = False
    trainer.train()
    assert not reporters(trainer)
    assert not list(tmp_path.iterdir())
