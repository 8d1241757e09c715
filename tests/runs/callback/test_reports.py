"""When a LowMemCallback measures, and where its numbers go."""

import copy
import json
import logging
import pickle

import pytest
from transformers import TrainerCallback

from hf_lowmem.memory import optimizer_bytes
from hf_lowmem.training.callbacks import LowMemCallback
from tests.runs.callback.runs import (
    records,
    trainer_of,
)


@pytest.mark.train
@pytest.mark.parametrize(("every", "steps"), [(None, [1]), (1, [1, 2, 3, 4, 5]), (2, [1, 3, 5])])
def test_every(tmp_path, every, steps):
    trainer = trainer_of(tmp_path, LowMemCallback(every=every, verbose=False), max_steps=5)
    trainer.train()
    *measured, last = records(trainer)
    assert [r["step"] for r in measured] == steps
    assert all(r["lowmem/saved_gib"] == measured[0]["lowmem/saved_gib"] > 0 for r in measured)
    assert last["step"] == 5
    assert last["lowmem/peak_rss_gib"] >= measured[0]["lowmem/peak_rss_gib"] > 0


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "2"])
def test_every_is_checked_at_construction(every):
    with pytest.raises((TypeError, ValueError), match="every="):
        LowMemCallback(every=every)


@pytest.mark.train
def test_records_are_plain_numbers_and_reach_trainer_state_json(tmp_path):
    trainer = trainer_of(tmp_path, LowMemCallback(verbose=False), save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_state()
    for record in records(trainer):
        assert all(type(v) in (int, float) for v in record.values())
    first = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())["log_history"]
    assert any(r.get("lowmem/optimizer_gib", 0) > 0 for r in first)
    written = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [r for r in written if "lowmem/saved_gib" in r] == records(trainer)


@pytest.mark.train
def test_several_trainings_each_have_their_report(tmp_path):
    callback = LowMemCallback(verbose=False)
    trainer = trainer_of(tmp_path, callback)
    trainer.train()
    first = callback.report
    trainer.model.model.embed_tokens.requires_grad_(False)  # type: ignore[union-attr]
    trainer.train()
    assert callback.report is not first
    assert callback.report["gradients"] < first["gradients"]
    assert [r["step"] for r in records(trainer)] == [1, 3]


@pytest.mark.train
def test_resume_keeps_the_records_and_measures_again(tmp_path):
    trainer_of(tmp_path, LowMemCallback(verbose=False), save_strategy="steps", save_steps=2).train()
    callback = LowMemCallback(verbose=False)
    trainer = trainer_of(tmp_path, callback, max_steps=4, restore_callback_states_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert callback in trainer.callback_handler.callbacks
    assert callback.report["saved_step"] == 3
    assert [r["step"] for r in records(trainer)] == [1, 3, 4]
    assert optimizer_bytes(trainer.optimizer) == callback.report["optimizer"] > 0  # type: ignore[arg-type]


@pytest.mark.train
def test_added_after_the_trainer_was_made(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.add_callback(callback := LowMemCallback(verbose=False))
    trainer.train()
    assert callback.report["saved"] > 0


@pytest.mark.train
def test_added_while_training(tmp_path):
    callback = LowMemCallback(verbose=False)

    class Late(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                trainer.add_callback(callback)

    trainer = trainer_of(tmp_path, Late())
    trainer.train()
    assert callback.report["saved_step"] == 2
    assert callback.report["peak"] > 0


@pytest.mark.train
def test_the_class_itself_can_be_given(tmp_path):
    trainer = trainer_of(tmp_path, LowMemCallback)
    (callback,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, LowMemCallback)]
    callback.verbose = False
    trainer.train()
    assert callback.report["saved"] > 0


@pytest.mark.train
def test_copies_and_pickles_carry_the_report(tmp_path):
    callback = LowMemCallback(every=2, verbose=False)
    copies: list[LowMemCallback] = []

    class Copier(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            copies.extend([copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))])

    trainer_of(tmp_path, callback, Copier(), gradient_accumulation_steps=2, max_steps=1).train()
    for other in [*copies, copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))]:
        assert other.every == 2
        assert other.report["saved"] == callback.report["saved"]
    assert len(copies) == 2
    fresh = trainer_of(tmp_path, copies[0])
    fresh.train()
    assert copies[0].report["saved_step"] == 3  # of steps 1 and 3


@pytest.mark.train
def test_the_table(tmp_path, capsys, caplog):
    callback = LowMemCallback()
    trainer = trainer_of(tmp_path, callback)
    trainer.train()
    out = capsys.readouterr().out
    for words in ("weights", "gradients", "optimizer state", "saved for backward", "process RSS, sampled"):
        assert words in out
    trainer.state.is_world_process_zero = False
    with caplog.at_level(logging.INFO, logger="hf_lowmem.runs.callback"):
        callback.on_train_end(trainer.args, trainer.state, trainer.control)
    assert "optimizer state" in caplog.text
    assert capsys.readouterr().out == ""


@pytest.mark.train
def test_not_verbose_prints_nothing_of_its_own(tmp_path, capsys):
    trainer_of(tmp_path, LowMemCallback(verbose=False)).train()
    assert "optimizer state" not in capsys.readouterr().out
