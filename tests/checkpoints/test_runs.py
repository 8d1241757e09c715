"""Which checkpoint of a folder a run goes on from: its own, readable, with an optimizer; none where it is finished."""

import errno
import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_lowmem import LowMemTrainer, LowMemTrainingArguments
from hf_lowmem.checkpoints import (
    MANIFEST,
    BadCheckpoint,
    begin_run,
    check_resumable,
    last_complete,
    read_manifest,
    verify,
    write_manifest,
)
from hf_lowmem.runs.report import read_report
from tests.checkpoints.test_checkpoints import trainer
from tests.conftest import tiny_llama
from tests.training.test_trainers import token_data


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("run")
    made = trainer(folder, logging_steps=1)
    made.train()
    return folder, made


@pytest.fixture
def run(finished: tuple[Path, Any], tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def made(place: Path, step: int, **facts: Any) -> Path:
    """A checkpoint without anything to load in it."""
    folder = place / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    write_manifest(folder, step=step, **facts)
    return folder


def steps_of(found: Path | None) -> int | None:
    return None if found is None else int(found.name.split("-")[1])


def spoilt(manifest: Any) -> str:
    return json.dumps({"format": 1, "files": manifest})


ENTRY = {"bytes": 1, "sha256": "0"}
MANIFESTS = {
    "a name that is too long": spoilt({"x" * 5000: ENTRY}),
    "a name with a zero": spoilt({"a\0b": ENTRY}),
    "a name outside": spoilt({"../checkpoint-2/trainer_state.json": ENTRY}),
    "a name from the root": spoilt({"/etc/passwd": ENTRY}),
    "nested deep": "[" * 100_000,
    "nested deep within": '{"files": ' + "[" * 100_000,
    "no object": "[]",
    "a list of files": spoilt(["a"]),
    "no UTF-8": "\udcff",
    "a number too long": '{"files": {"a": {"bytes": ' + "9" * 5000 + "}}}",
    "empty": "",
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_that_cannot_be_used_is_named_and_the_one_before_is_taken(case: str, tmp_path: Path) -> None:
    made(tmp_path, 2)
    (made(tmp_path, 4) / MANIFEST).write_text(MANIFESTS[case], encoding="utf-8", errors="surrogateescape")
    found, (why,) = last_complete(tmp_path)
    assert steps_of(found) == 2
    assert str(tmp_path / "checkpoint-4") in why
    with pytest.raises(BadCheckpoint):
        verify(tmp_path / "checkpoint-4")


@pytest.mark.train
@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ENOENT])
@pytest.mark.parametrize("file", ["optimizer.pt", "trainer_state.json", MANIFEST])
def test_a_file_that_cannot_be_read_is_named_and_the_one_before_is_taken(
    code: int, file: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = run / "checkpoint-6" / file
    opened = Path.open

    def open_unless_broken(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path == broken:
            raise OSError(code, "gone wrong", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_unless_broken)
    found, (why,) = last_complete(run)
    assert steps_of(found) == 4
    assert f"{broken} cannot be read (gone wrong)" in why
    with pytest.raises(BadCheckpoint, match="gone wrong"):
        verify(run / "checkpoint-6")


@pytest.mark.train
def test_a_sector_that_cannot_be_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = hashlib.file_digest

    def digest(file: Any, *args: Any) -> Any:
        if "checkpoint-6/model" in file.name:
            raise OSError(errno.EIO, "Input/output error")
        return whole(file, *args)

    monkeypatch.setattr(hashlib, "file_digest", digest)
    found, (why,) = last_complete(run)
    assert steps_of(found) == 4
    assert f"{run / 'checkpoint-6'} cannot be read (Input/output error)" in why


def test_a_checkpoint_that_vanishes_while_it_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path, 2)
    gone = made(tmp_path, 4)

    def vanish(folder: Any) -> None:
        shutil.rmtree(gone, ignore_errors=True)
        return verify(folder)

    monkeypatch.setattr("hf_lowmem.checkpoints.runs.verify", vanish)
    assert steps_of(last_complete(tmp_path)[0]) == 2


@pytest.fixture
def alone(run: Path) -> Path:
    """A newest checkpoint as save_only_model leaves it."""
    folder = run / "checkpoint-6"
    facts = read_manifest(folder) or {}
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).unlink()
    write_manifest(folder, run=facts["run"])
    return folder


@pytest.mark.train
def test_a_model_alone_is_complete_but_no_run_goes_on_from_it(alone: Path, run: Path) -> None:
    verify(alone)
    with pytest.raises(BadCheckpoint, match=r"no optimizer state.*save_only_model=False.*complete checkpoint is .*-4"):
        trainer(run).train(resume_from_checkpoint=str(alone))


@pytest.mark.train
@pytest.mark.parametrize("resume", [True, "auto"])
def test_a_model_alone_is_passed_over_in_words(resume: Any, alone: Path, run: Path, caplog: Any) -> None:
    trainer(run).train(resume_from_checkpoint=resume)
    assert f"passed over: {alone} has a model and no optimizer state" in caplog.text
    check_resumable(alone)  # saved again, from step 4 on


@pytest.mark.train
def test_models_alone_are_refused_by_true_and_begin_anew_by_auto(tmp_path: Path, caplog: Any) -> None:
    trainer(tmp_path, max_steps=2, save_only_model=True).train()
    with pytest.raises(ValueError, match=r"there is no complete checkpoint in .*\n- .*has a model and no optimizer"):
        trainer(tmp_path).train(resume_from_checkpoint=True)
    assert trainer(tmp_path, max_steps=1).train(resume_from_checkpoint="auto").global_step == 1
    assert "the run begins anew" in caplog.text


@pytest.mark.train
@pytest.mark.parametrize("marked", [True, False], ids=["with a manifest", "plain transformers'"])
@pytest.mark.parametrize("lacking", ["optimizer.pt", "scheduler.pt"])
def test_transformers_would_silently_begin_moments_anew(lacking: str, marked: bool, run: Path) -> None:
    """It reads neither file where one of the two is missing."""
    for folder in run.glob("checkpoint-*"):
        (folder / MANIFEST).unlink()
        if folder.name == "checkpoint-6":
            (folder / lacking).unlink()
        if marked:
            write_manifest(folder)
    with pytest.raises(BadCheckpoint, match=r"has a model and no (optimizer state|learning rate schedule)"):
        trainer(run).train(resume_from_checkpoint=str(run / "checkpoint-6"))
    assert steps_of(last_complete(run)[0]) == 4


@pytest.mark.parametrize(
    ("files", "resumable"),
    [
        (("model.safetensors", "optimizer.pt", "scheduler.pt"), True),
        (("adapter_model.safetensors", "optimizer.pt", "scheduler.pt"), True),
        (("adapter_model.safetensors",), False),
        (("mine/adapter_model.safetensors",), False),
        (("model-00001-of-00002.safetensors",), False),
        (("pytorch_model.bin", "scheduler.pt"), False),
        (("pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata", "scheduler.pt"), True),
        (("pytorch_model_fsdp_0/.metadata", "scheduler.pt"), False),
        (("pytorch_model_fsdp.bin", "optimizer.bin", "scheduler.pt"), True),
        (("global_step4/mp_rank_00_model_states.pt", "global_step4/zero_pp_rank_0_mp_rank_00_optim_states.pt"), True),
        (("global_step4/mp_rank_00_model_states.pt",), False),
    ],
)
def test_each_form_of_checkpoint(files: tuple[str, ...], resumable: bool, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    if resumable:
        check_resumable(tmp_path)
    else:
        with pytest.raises(BadCheckpoint, match="save_only_model=False"):
            check_resumable(tmp_path)


def test_the_run_begun_last_goes_on_though_an_older_ones_number_is_higher(tmp_path: Path) -> None:
    first = begin_run(tmp_path)
    for step in (4, 8, 12):
        made(tmp_path, step, run=first)
    second = begin_run(tmp_path)
    assert (first["order"], second["order"]) == (1, 2)
    shutil.rmtree(tmp_path / "checkpoint-4")
    made(tmp_path, 4, run=second)
    for path in tmp_path.rglob("*"):  # as a copy leaves them
        path.touch()
    found, (why,) = last_complete(tmp_path)
    assert steps_of(found) == 4
    assert "holds two runs' checkpoints: checkpoint-12, checkpoint-8 of the run begun" in why
    assert f"resume_from_checkpoint={str(tmp_path / 'checkpoint-12')!r}" in why


def test_a_run_that_is_resumed_by_name_is_the_newest_again(tmp_path: Path) -> None:
    first = begin_run(tmp_path)
    made(tmp_path, 8, run=first)
    second = begin_run(tmp_path)
    made(tmp_path, 4, run=second)
    again = begin_run(tmp_path, tmp_path / "checkpoint-8")
    assert (again["id"], again["order"]) == (first["id"], 3)
    made(tmp_path, 10, run=again)
    assert steps_of(last_complete(tmp_path)[0]) == 10
    shutil.rmtree(tmp_path / "checkpoint-10")
    made(tmp_path, 10, run=begin_run(tmp_path, tmp_path / "checkpoint-4"))
    assert steps_of(last_complete(tmp_path)[0]) == 10
    assert begin_run(tmp_path, tmp_path / "checkpoint-4")["id"] == second["id"]


def test_of_two_folders_that_were_put_together_the_later_run_goes_on(tmp_path: Path) -> None:
    made(tmp_path, 8, run=begin_run(tmp_path / "a") | {"began": "2026-01-01T00:00:00+00:00"})
    made(tmp_path, 4, run=begin_run(tmp_path / "b") | {"began": "2026-01-02T00:00:00+00:00"})
    assert steps_of(last_complete(tmp_path)[0]) == 4


def test_a_damaged_checkpoint_does_not_lead_into_another_run(tmp_path: Path) -> None:
    made(tmp_path, 8, run=begin_run(tmp_path))
    own = made(tmp_path, 4, run=begin_run(tmp_path))
    (own / "trainer_state.json").write_text("{ }")
    found, passed = last_complete(tmp_path)
    assert found is None
    assert len(passed) == 2


def test_checkpoints_of_an_older_release_belong_to_the_run_that_went_on_from_them(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        made(tmp_path, step)
    assert steps_of(last_complete(tmp_path)[0]) == 6
    now = begin_run(tmp_path, tmp_path / "checkpoint-4")
    newer = made(tmp_path, 5, run=now)
    found, (why,) = last_complete(tmp_path)
    assert steps_of(found) == 5
    assert "checkpoint-6 of the run begun by an older release" in why
    (newer / "trainer_state.json").unlink()
    assert steps_of(last_complete(tmp_path)[0]) == 4


def test_a_run_that_is_not_one_counts_as_none(tmp_path: Path) -> None:
    for step, odd in enumerate(({"id": 1}, "x", {"id": "a", "order": True, "began": "", "after": 0}), 1):
        made(tmp_path, step, run=odd)
    assert steps_of(last_complete(tmp_path)[0]) == 3
    assert begin_run(tmp_path)["order"] == 1


@pytest.mark.train
def test_trainers_write_who_they_are(run: Path, caplog: Any) -> None:
    first = read_manifest(run / "checkpoint-2")["run"]  # type: ignore[index]
    assert first == read_manifest(run / "checkpoint-6")["run"]  # type: ignore[index]
    resumed = trainer(run, max_steps=8)
    resumed.train(resume_from_checkpoint=True)
    assert read_manifest(run / "checkpoint-8")["run"] == first  # type: ignore[index]
    trainer(run, max_steps=2).train()
    assert read_manifest(run / "checkpoint-2")["run"]["order"] == 2  # type: ignore[index]
    again = trainer(run, max_steps=3)
    again.train(resume_from_checkpoint="auto")
    assert again.state.global_step == 3
    assert "holds two runs' checkpoints: checkpoint-8, checkpoint-6, checkpoint-4 of the run begun" in caplog.text


def history(made: Any) -> list[dict[str, Any]]:
    """Without what the clock says."""
    timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    return [{k: v for k, v in row.items() if k not in timed} for row in made.state.log_history]


@pytest.mark.train
@pytest.mark.parametrize("resume", ["auto", True, "checkpoint-6"])
def test_a_finished_run_ends_as_it_did(resume: Any, finished: tuple[Path, Any], run: Path, caplog: Any) -> None:
    _, whole = finished
    again = trainer(run, logging_steps=1)
    with caplog.at_level(logging.WARNING):
        result = again.train(resume_from_checkpoint=str(run / resume) if resume == "checkpoint-6" else resume)
    assert result.global_step == again.state.global_step == 6
    for ours, theirs in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert "the run was finished: its checkpoint is at step 6 of 6" in caplog.text
    assert "raise max_steps" in caplog.text
    theirs = history(whole)
    assert history(again)[:-1] == theirs[:-1]
    assert result.training_loss == result.metrics["train_loss"] == pytest.approx(theirs[-1]["train_loss"], rel=1e-6)
    (training,) = read_report(run)["trainings"]
    assert (training["from_step"], training["to_step"], training["finished"]) == (0, 6, True)


@pytest.mark.train
@pytest.mark.parametrize(
    "settings",
    [
        {"max_steps": -1, "num_train_epochs": 1, "save_steps": 10},
        {"max_steps": 3, "save_steps": 3},
        {"max_steps": 7, "save_steps": 7, "gradient_accumulation_steps": 2},
    ],
)
def test_neither_does_a_run_of_other_lengths_train_on(settings: dict[str, Any], tmp_path: Path) -> None:
    whole = trainer(tmp_path, **settings)
    whole.train()
    again = trainer(tmp_path, **settings)
    again.train(resume_from_checkpoint="auto")
    assert again.state.global_step == whole.state.global_step
    for ours, theirs in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.train
def test_a_finished_run_without_any_row_has_no_loss(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=2, logging_strategy="no").train()
    result = trainer(tmp_path, max_steps=2, logging_strategy="no").train(resume_from_checkpoint="auto")
    assert result.training_loss != result.training_loss


@pytest.mark.train
def test_a_finished_run_trains_on_with_more_steps(run: Path) -> None:
    longer = trainer(run, max_steps=8)
    result = longer.train(resume_from_checkpoint="auto")
    assert longer.state.global_step == 8
    assert result.training_loss > 0


FIELDS: dict[str, dict[str, Any]] = {
    "every field at its default": {"optim": "adamw_torch", "lowmem_state": None},
    "activations": {"lowmem_activations": "fp8"},
    "8-bit states, rows at other steps": {"logging_steps": 2},
}


@pytest.mark.train
@pytest.mark.parametrize("fields", FIELDS)
def test_a_resumed_runs_history_is_the_uninterrupted_ones(fields: str, tmp_path: Path) -> None:
    rows = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        made = trainer(tmp_path, **({"logging_steps": 1} | FIELDS[fields]))
        made.train(resume_from_checkpoint=resume)
        rows.append([{k: v for k, v in r.items() if not k.startswith("train_")} for r in made.state.log_history])
    assert rows[0] == rows[1]
    assert not [name for row in rows[0] for name in row if name.startswith(("lowmem/", "memory/"))]


@pytest.mark.train
def test_with_every_field_at_its_default_the_history_is_the_plain_trainers(tmp_path: Path) -> None:
    rows = []
    for cls, config in ((Trainer, TrainingArguments), (LowMemTrainer, LowMemTrainingArguments)):
        args = config(str(tmp_path), use_cpu=True, max_steps=3, logging_steps=1, report_to="none", disable_tqdm=True)
        made = cls(tiny_llama(), args, train_dataset=token_data())
        result = made.train()
        rows.append([history(made), sorted(result.metrics)])
    assert rows[0] == rows[1]
