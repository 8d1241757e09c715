"""Every run leaves a report and a card that agree with what was measured; nobody's text is lost, no training either."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard as Card
from peft import LoraConfig
from trl import SFTConfig

from hf_lowmem import (
    LowMemCallback,
    LowMemSFTConfig,
    LowMemSFTTrainer,
    LowMemTrainer,
    LowMemTrainingArguments,
    checkpoints,
)
from hf_lowmem.memory import human_bytes
from hf_lowmem.runs import card as cards
from hf_lowmem.runs.card import BEGIN, END, refresh, render, whole_card
from hf_lowmem.runs.facts import plain as plain_values
from hf_lowmem.runs.facts import public_name
from hf_lowmem.runs.history import POINTS, history_of, results_of, speed_of
from hf_lowmem.runs.report import REPORT, predicted_of, read_report, write_atomically
from tests.conftest import tiny_llama
from tests.runs.callback.runs import trainer_of
from tests.runs.cards import OURS, PLAN, SAVING, dpo, hub_accepts, made_up, plain, reporter, sft
from tests.training.test_trainers import settings, token_data


def card_of(run: Path) -> str:
    return (run / "README.md").read_text(encoding="utf-8")


def load_card(path: Path) -> Any:
    return Card.load(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> tuple[Path, Any]:
    run = tmp_path_factory.mktemp("sft")
    trainer = sft(run, tokenizer, **SAVING)
    trainer.train()
    return run, trainer


@pytest.fixture
def run(finished: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy of the run, to be spoilt."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


@pytest.mark.train
def test_report_and_card_say_what_was_measured(finished: tuple[Path, Any]) -> None:
    run, trainer = finished
    measured = reporter(trainer).report
    report, card = read_report(run), card_of(run)
    (training,) = report["trainings"]
    assert training["memory"] == {k: v for k, v in measured.items() if k != "saved_by_module"}
    for part in ("weights", "gradients", "optimizer", "saved", "peak"):
        assert f"| {human_bytes(measured[part])} |" in card
    last = trainer.state.log_history[-1]
    tokens = next(row["num_tokens"] for row in reversed(trainer.state.log_history) if "num_tokens" in row)
    assert training["speed"]["steps_per_second"] == last["train_steps_per_second"]
    assert training["speed"]["tokens_per_second"] == pytest.approx(tokens / last["train_runtime"])
    evals = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert report["results"]["eval_loss"] == evals[-1]
    assert report["results"]["train_loss"] == last["train_loss"]
    assert f"| train loss, mean of the training | {last['train_loss']:.4g} |" in card
    assert [r["loss"] for r in report["history"] if "loss" in r] == [
        r["loss"] for r in trainer.state.log_history if "loss" in r
    ]
    assert (training["from_step"], training["to_step"], training["finished"]) == (0, 4, True)
    assert "`lowmem_state` | int8" in card
    assert "`optim` | apollo_mini" in card
    assert f"transformers {report['versions']['transformers']}" in card
    assert cards.MISSING not in card


@pytest.mark.train
def test_the_card_is_trls_with_a_section(finished: tuple[Path, Any]) -> None:
    run, _ = finished
    hub_accepts(run / "README.md")
    card = load_card(run / "README.md")
    assert {"trl", "sft", "hf-lowmem", "generated_from_trainer"} <= set(card.data.tags)
    assert card.data.library_name == "transformers"
    assert card.text.index("## Quick start") < card.text.index("## Training, memory and speed")
    assert card.text.index(END) < card.text.index("## Citations") < card.text.index("vonwerra2020trl")
    for sign in ("{{ card_data", "{%", "Undefined"):
        assert sign not in card.text


@pytest.mark.train
def test_neither_folders_nor_tokens_are_told(tmp_path: Path, tokenizer: Any) -> None:
    run = tmp_path / "some" / "where"
    sft(run, tokenizer, max_steps=1, hub_token="hf_secret", push_to_hub=False, deepspeed=None).train()
    told = card_of(run) + (run / REPORT).read_text()
    assert str(tmp_path) not in told
    assert "hf_secret" not in told


@pytest.mark.train
def test_the_card_is_rebuilt_the_same(finished: tuple[Path, Any], run: Path) -> None:
    first = card_of(run)
    report = read_report(run)
    refresh(run, report)
    assert card_of(run) == first
    (run / "README.md").unlink()
    refresh(run, report)
    assert card_of(run) == first


@pytest.mark.train
def test_a_trainers_state_gives_the_same_memory(run: Path, tokenizer: Any) -> None:
    """Where a MemoryReportCallback has written it there; a trainer's own report leaves logs alone."""
    trainer = sft(run, tokenizer, **SAVING)
    trainer.add_callback(LowMemCallback(verbose=False))
    trainer.train()
    whole = read_report(run)
    (run / REPORT).unlink()
    report = read_report(run)  # the newest checkpoint's; training had not ended, so no speed
    (training,) = report["trainings"]
    parts = ("weights", "trainable", "gradients", "optimizer", "saved")
    assert [training["memory"][p] for p in parts] == [whole["trainings"][0]["memory"][p] for p in parts]
    assert training["to_step"] == 4
    assert not training["finished"]
    assert report["results"]["last_loss"] == whole["results"]["last_loss"]
    assert report["versions"] == checkpoints.read_manifest(run / "checkpoint-4")["versions"]  # type: ignore[index]
    card = whole_card(report)
    assert "Settings: not recorded." in card
    assert f"| tokens/s | {cards.MISSING} |" in card


@pytest.mark.train
def test_checkpoints_are_complete_and_have_no_card_of_ours(finished: tuple[Path, Any]) -> None:
    run, _ = finished
    for step in (2, 4):
        checkpoints.verify(run / f"checkpoint-{step}")
        assert not (run / f"checkpoint-{step}" / REPORT).exists()
        assert not (run / f"checkpoint-{step}" / "README.md").exists()


@pytest.mark.train
def test_a_resumed_run_tells_of_both_trainings_and_a_new_one_does_not(run: Path, tokenizer: Any) -> None:
    first = read_report(run)["trainings"][0]
    trainer = sft(run, tokenizer, **SAVING)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    before, now = read_report(run)["trainings"]
    assert before == first
    assert (now["from_step"], now["to_step"], now["finished"]) == (2, 4, True)
    assert now["memory"]["saved_step"] == 3
    assert "### Resumed" in card_of(run)
    assert card_of(run).count(END) == 1
    trainer = sft(run, tokenizer, max_steps=1)
    trainer.train()
    (only,) = read_report(run)["trainings"]
    assert (only["from_step"], only["to_step"]) == (0, 1)
    assert "### Resumed" not in card_of(run)


@pytest.mark.train
def test_a_resumed_run_with_a_damaged_report_begins_one(run: Path, tokenizer: Any, caplog: Any) -> None:
    (run / REPORT).write_text("{")
    sft(run, tokenizer).train(resume_from_checkpoint=str(run / "checkpoint-2"))
    (only,) = read_report(run)["trainings"]
    assert only["from_step"] == 2
    assert "the report begins at step 2" in caplog.text


@pytest.mark.train
def test_tokens_of_a_second_training_are_its_own(tmp_path: Path, tokenizer: Any) -> None:
    trainer = sft(tmp_path, tokenizer, max_steps=2)
    counts = []
    for _ in range(2):
        trainer.train()
        counts.append(read_report(tmp_path)["trainings"][-1]["speed"]["tokens"])
    assert counts == [2 * 2 * 12, 2 * 2 * 12]  # steps, rows, tokens, as `token_data` has them


@pytest.mark.train
def test_lora_and_preferences(tmp_path: Path, tokenizer: Any) -> None:
    trainer = dpo(tmp_path, tokenizer)
    trainer.train()
    report = read_report(tmp_path)
    assert report["trainer"] == "LowMemDPOTrainer"
    assert report["model"]["trained"] < report["model"]["parameters"]
    assert report["model"]["adapters"]["default"]["r"] == 2
    assert report["trainings"][0]["memory"]["gradients"] == 4 * report["model"]["trained"]
    assert "dpo" in load_card(tmp_path / "README.md").data.tags
    assert "`loss_type` | ['asft']" in card_of(tmp_path)
    section = card_of(tmp_path).split(BEGIN[:20])[1].split(END)[0]
    trainer.save_model()  # PEFT puts its own lines into the card
    card = load_card(tmp_path / "README.md")
    assert card.data.library_name == "peft"
    assert section in str(card)
    hub_accepts(tmp_path / "README.md")
    refresh(tmp_path, report)
    again = load_card(tmp_path / "README.md")
    assert again.data.library_name == "peft"
    assert "PEFT" in again.text
    assert str(again).count(END) == 1


@pytest.mark.train
def test_transformers_trainer_gets_the_templates_card(tmp_path: Path) -> None:
    plain(tmp_path).train()
    hub_accepts(tmp_path / "README.md")
    card = load_card(tmp_path / "README.md")
    assert card.data.tags == ["generated_from_trainer", "hf-lowmem"]
    assert card.data.model_name == tmp_path.name
    assert "Trained with `LowMemTrainer`" in card.text
    assert read_report(tmp_path)["results"]["steps"] == 1
    assert "| eval loss, last | not measured |" in card.text


@pytest.mark.train
def test_an_unmodified_trainer_with_the_callback_leaves_a_report(tmp_path: Path) -> None:
    callback = LowMemCallback(verbose=False)
    trainer_of(tmp_path, callback).train()
    report = read_report(tmp_path)
    assert report["trainings"][0]["memory"]["saved"] == callback.report["saved"]
    assert report["settings"]["max_steps"] == 3
    assert not (tmp_path / "README.md").exists()
    refresh(tmp_path, report)
    assert "a trainer whose name is not recorded" in card_of(tmp_path)
    assert "hf-lowmem" in load_card(tmp_path / "README.md").data.tags


@pytest.mark.train
def test_with_plain_arguments_everything_is_as_the_parent_has_it(tmp_path: Path, tokenizer: Any) -> None:
    args = settings(SFTConfig, tmp_path, max_steps=1)
    LowMemSFTTrainer(tiny_llama(), args=args, train_dataset=token_data(), processing_class=tokenizer).train()
    assert not list(tmp_path.iterdir())


@pytest.mark.train
def test_a_card_that_a_person_wrote_stays(tmp_path: Path, tokenizer: Any, caplog: Any) -> None:
    mine = "---\ntags:\n- mine\n---\n# My model\n"
    (tmp_path / "README.md").write_text(mine)
    sft(tmp_path, tokenizer, max_steps=2, **{k: v for k, v in SAVING.items() if k.startswith("save")}).train()
    assert card_of(tmp_path) == mine
    assert f"{tmp_path / 'README.md'} was not made by a trainer" in caplog.text
    assert read_report(tmp_path)["trainings"][0]["finished"]


@pytest.mark.train
def test_what_a_person_adds_to_a_card_stays(run: Path, tokenizer: Any) -> None:
    text = card_of(run).replace("## Citations", "## Intended use\n\nOnly for tests.\n\n## Citations")
    (run / "README.md").write_text(text.replace("# Model Card for", "# My own title:"))
    trainer = sft(run, tokenizer, max_steps=1)
    trainer.train()
    card = card_of(run)
    assert "Only for tests." in card
    assert "# My own title:" in card
    assert "| steps | 1 |" in card
    assert card.count(END) == 1
    (run / "README.md").unlink()
    refresh(run, read_report(run))
    assert card_of(run) == card, "the report keeps the text around the section"


@pytest.mark.train
def test_a_generated_card_without_our_section_gets_it_and_keeps_its_text(tmp_path: Path, tokenizer: Any) -> None:
    theirs = "---\ntags:\n- generated_from_trainer\n---\n\n# Tuned\n\nI have edited this.\n"
    (tmp_path / "README.md").write_text(theirs)
    sft(tmp_path, tokenizer, max_steps=1).train()
    assert card_of(tmp_path).startswith(theirs)
    assert "## Training, memory and speed" in card_of(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dataset": {"name": "org/data", "rows": 2}},
        {"dataset": {"name": "a folder with spaces"}, "model": {"name": "folder"}},
        {"model": {"name": None}, "dataset": {}, "trainer": None, "run": "a: b | c"},
        {"model": {"name": "org/Tiny"}, "versions": {}, "run": "été"},
    ],
)
def test_the_hub_accepts_a_card_that_is_ours_alone(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "README.md"
    path.write_text(whole_card(made_up(**changes)), encoding="utf-8")
    hub_accepts(path)


@pytest.mark.train
def test_adapters_of_a_model_in_a_folder_do_not_name_the_folder(tmp_path: Path, tokenizer: Any) -> None:
    """PEFT's card would, and the hub would refuse it; in checkpoints, too."""
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    args = settings(LowMemSFTConfig, tmp_path / "out", **OURS, max_length=16, max_steps=1, save_steps=1)
    args.save_strategy = "steps"
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    data = token_data()
    trainer = LowMemSFTTrainer(
        str(tmp_path / "base"), args=args, train_dataset=data, processing_class=tokenizer, peft_config=lora
    )
    trainer.train()
    trainer.save_model()
    for card in (tmp_path / "out" / "README.md", tmp_path / "out" / "checkpoint-1" / "README.md"):
        hub_accepts(card)
        head = card.read_text().split("---")[1]
        assert str(tmp_path) not in head
        assert "base_model" not in head
        assert "lora" in head


@pytest.mark.train
def test_pushing_extends_transformers_own_card(tmp_path: Path, monkeypatch: Any) -> None:
    trainer = plain(tmp_path)
    trainer.train()
    trainer.create_model_card(model_name="pushed", tags="mine")  # as push_to_hub does
    card = load_card(tmp_path / "README.md")
    assert {"generated_from_trainer", "hf-lowmem", "mine"} <= set(card.data.tags)
    assert "Intended uses & limitations" in card.text
    assert "## Training, memory and speed" in card.text


@pytest.mark.train
def test_a_card_that_cannot_be_written_ends_no_training(tmp_path: Path, tokenizer: Any, monkeypatch: Any, caplog: Any):
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_lowmem.runs.report.write_atomically", full)
    monkeypatch.setattr("hf_lowmem.runs.card.write_atomically", full)
    trainer = sft(tmp_path, tokenizer, max_steps=2, save_strategy="steps", save_steps=2)
    with caplog.at_level(logging.WARNING):
        result = trainer.train()
    assert result.global_step == 2
    assert "no card of the run" in caplog.text
    assert "No space left on device" in caplog.text
    checkpoints.verify(tmp_path / "checkpoint-2")


def test_a_write_that_is_cut_off_leaves_the_old_file(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "README.md"
    write_atomically(path, "old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]
    assert path.read_text() == "old"


@pytest.mark.train
def test_only_rank_zero_writes(tmp_path: Path, tokenizer: Any) -> None:
    trainer = sft(tmp_path, tokenizer, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.is_world_process_zero = lambda: False
    trainer.train()
    assert reporter(trainer).report["saved"] > 0, "every process measures"
    assert not [p.name for p in tmp_path.iterdir() if p.is_file()]


@pytest.mark.train
def test_what_was_predicted_stands_beside(tmp_path: Path) -> None:
    trainer = plain(tmp_path)
    trainer.predicted = PLAN
    trainer.train()
    card = card_of(tmp_path)
    assert "| part | predicted | measured |" in card
    assert "| gradients | 3.00 KiB |" in card, "a part's own highest, not what it is at the peak"
    assert "| saved for backward | 2.00 KiB |" in card
    assert "sampled) | 5.00 KiB |" in card
    assert predicted_of(PLAN, "a plan")["parts"] == {"weights": 1024, "gradients": 3072, "activations": 2048}


def test_a_diverged_run_says_so() -> None:
    nan = float("nan")
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": nan}, {"step": 2, "train_runtime": 1.0, "train_loss": nan}]
    report = made_up(results=results_of(rows), history=history_of(rows))
    assert json.loads(json.dumps(report, allow_nan=False))["results"]["train_loss"] == "nan"
    assert "| train loss, last logged | nan |" in render(report)
    assert speed_of(rows) == {"seconds": 1.0}


@pytest.mark.parametrize("steps", [1, POINTS, POINTS + 1, 10_000])
def test_curves_are_thinned_to_their_last_point(steps: int) -> None:
    rows = [{"step": i, "epoch": i / 9, "loss": 1.0 / i} for i in range(1, steps + 1)]
    kept = history_of([*rows, {"step": steps, "epoch": 1.0, "eval_loss": 0.5}])
    losses = [row for row in kept if "loss" in row]
    assert 1 <= len(losses) <= POINTS
    assert len(losses) > POINTS // 2 or steps == 1
    assert losses[-1]["step"] == steps
    assert kept[-1]["eval_loss"] == 0.5


def test_values_in_a_table_cannot_leave_it() -> None:
    nasty = f"a|b\n{END}\n<script>"
    section = render(made_up(settings={"optim": nasty}, device=nasty, run=nasty))
    assert END not in section
    assert "<script>" not in section
    assert "| `optim` | a\\|b &lt;!-- hf_lowmem" in section


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("org/name", "org/name"),
        ("/data/models/mine", "mine"),
        ("/cache/models--org--name/snapshots/0123abcd", "org/name"),
    ],
)
def test_models_are_named_without_paths(name: str, public: str) -> None:
    assert public_name(name) == public
    assert plain_values({"model": name}) == {"model": public}


@pytest.mark.train
def test_settings_are_those_that_matter(tmp_path: Path, tokenizer: Any) -> None:
    report = reporter_after(plain(tmp_path, run_name="x", logging_steps=7, weight_decay=0.0))
    assert OURS.items() <= report["settings"].items()
    assert report["settings"]["weight_decay"] == 0.0, "given although it is the default"
    assert not {"run_name", "logging_steps", "output_dir", "report_to"} & set(report["settings"])


def reporter_after(trainer: Any) -> dict[str, Any]:
    trainer.train()
    return read_report(trainer.args.output_dir)


@pytest.mark.train
def test_a_dataset_that_cannot_be_described_ends_no_training(tmp_path: Path, caplog: Any) -> None:
    class Odd(list):
        @property
        def info(self) -> Any:
            raise RuntimeError("gone")

    args = settings(LowMemTrainingArguments, tmp_path, max_steps=1, **OURS)
    result = LowMemTrainer(tiny_llama(), args, train_dataset=Odd(list(token_data()))).train()  # type: ignore[arg-type]
    assert result.global_step == 1
    assert "no report of the run" in caplog.text
    assert "RuntimeError: gone" in caplog.text
