"""Flags and files together: what unsets a field, and whose options a loss has."""

from pathlib import Path
from typing import Any

import pytest
from trl import ModelConfig

from hf_lowmem import LowMemDPOConfig, LowMemSFTConfig
from hf_lowmem.cli import train
from hf_lowmem.cli.parsing import Parser
from hf_lowmem.cli.sft import run
from hf_lowmem.cli.wrong import WrongCommand

ASFT = "loss_type: [asft]\nasft_lambda: 2.0\nbeta: 0.1\noptim: adamw\nlowmem_state: 8bit\nlearning_rate: 1.0e-6\n"


def read(config: Any, *words: str) -> Any:
    args, _ = Parser((config, ModelConfig), prog="hf-lowmem x").read(["--output_dir", "out", "--use_cpu", *words])
    return args


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "asft.yaml"
    path.write_text(ASFT)
    return str(path)


@pytest.mark.parametrize("word", ["none", "None", "null", ""])
@pytest.mark.parametrize("equals", [False, True])
def test_a_setting_of_the_file_is_unset_by_the_command_line(file: str, word: str, equals: bool) -> None:
    unset = [f"--lowmem_state={word}"] if equals else ["--lowmem_state", word]
    args = read(LowMemDPOConfig, "--config", file, *unset, "--seed", "7")
    assert args.lowmem_state is None
    assert (args.optim, args.seed, args.asft_lambda) == ("adamw", 7, 2.0)
    assert read(LowMemDPOConfig, "--config", file).lowmem_state == "8bit"


def test_a_field_with_a_default_gets_it_back(file: str) -> None:
    args = read(LowMemDPOConfig, "--config", file, "--learning_rate", "null", "--optim", "null", "--lowmem-state", "")
    default = LowMemDPOConfig("out", use_cpu=True)
    assert args.learning_rate == default.learning_rate
    assert args.optim == default.optim


def test_the_last_of_two_flags_counts() -> None:
    words = ["--optim", "lion", "--lowmem_state", "8bit"]
    assert read(LowMemSFTConfig, *words, "--lowmem_state", "null").lowmem_state is None
    assert read(LowMemSFTConfig, "--lowmem_state", "null", *words).lowmem_state == "8bit"


def test_none_stays_a_value_where_it_is_one(file: str) -> None:
    args = read(LowMemDPOConfig, "--config", file, "--lowmem_reference", "none", "--report_to", "none")
    assert args.lowmem_reference == "none"
    assert args.report_to == []


def test_null_in_a_file_is_the_default(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("learning_rate: null\nlowmem_rank: null\noptim: apollo\n")
    args = read(LowMemSFTConfig, "--config", str(tmp_path / "a.yaml"))
    assert args.learning_rate == LowMemSFTConfig("out", use_cpu=True).learning_rate
    assert args.lowmem_rank is None


@pytest.mark.parametrize("loss", ["orpo", "simpo", "sigmoid"])
def test_another_loss_does_not_inherit_the_file_s_options(file: str, loss: str, capsys: Any) -> None:
    args = read(LowMemDPOConfig, "--config", file, "--loss_type", loss)
    alone = LowMemDPOConfig("out", use_cpu=True, loss_type=[loss])
    assert (args.beta, args.asft_lambda) == (alone.beta, None)
    assert args.lowmem_state == "8bit", "what is no option of a loss stays"
    said = capsys.readouterr().err
    assert f"--loss_type {loss}: of the file, which is for asft, beta, asft_lambda is left out" in said


def test_a_flag_of_a_loss_is_taken_and_the_file_s_own_loss_keeps_its_options(file: str, capsys: Any) -> None:
    assert read(LowMemDPOConfig, "--config", file, "--loss_type", "simpo", "--beta", "3").beta == 3.0
    capsys.readouterr()
    same = read(LowMemDPOConfig, "--config", file, "--loss_type", "asft")
    assert (same.beta, same.asft_lambda) == (0.1, 2.0)
    assert capsys.readouterr().err == ""


def test_what_a_config_refuses_is_a_wrong_command(file: str) -> None:
    with pytest.raises(WrongCommand, match="lowmem_rank=3 has no effect with optim='adamw'"):
        read(LowMemDPOConfig, "--config", file, "--lowmem_rank", "3")
    with pytest.raises(WrongCommand, match="did you mean --lowmem_rank"):
        read(LowMemDPOConfig, f"--config={file}", "--lowmem_rnk=3")


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("save_strategy: no", "no"),  # which YAML makes False of
        ("eval_strategy: off", "no"),
        ("max_steps: 3.0", 3),
        ("max_steps: '3'", 3),
        ("learning_rate: 1e-5", 1e-5),  # a string to YAML
        ("packing: 1", True),
        ("run_name: 2024", "2024"),
        ("pad_to_multiple_of: 8", 8),
        ("resume_from_checkpoint: true", True),
        ("model_init_kwargs: {use_cache: false}", {"use_cache": False}),
    ],
)
def test_a_file_s_value_is_what_a_flag_s_word_would_be(line: str, value: object, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(line)
    found = getattr(read(LowMemSFTConfig, "--config", str(tmp_path / "a.yaml")), line.split(":")[0])
    assert (found, type(value)) == (value, type(getattr(found, "value", found)))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("report_to: no", ("report_to is False", "put it in quotes", "null leaves")),
        ("lowmem: off", ("lowmem is False", "null leaves")),
        ("learning_rate: yes", ("learning_rate is True",)),
        ("max_steps: 3.5", ("max_steps=3.5", "int")),
        ("packing: 2", ("packing=2", "true/false")),
        # Which transformers would take, and shuffle as if nothing had been said.
        ("train_sampling_strategy: group_by_lenght", ("'group_by_lenght'", "group_by_length,")),
        ("dtype: [bf16]", ("dtype", "bf16")),
    ],
)
def test_a_file_s_value_that_a_flag_would_refuse_is_refused(line: str, words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(line)
    with pytest.raises(WrongCommand) as refused:
        read(LowMemSFTConfig, "--config", str(tmp_path / "a.yaml"))
    assert all(word in str(refused.value) for word in words)


@pytest.mark.parametrize(("word", "meant"), [("True", True), ("true", True), ("False", None), ("auto", "auto")])
def test_the_words_of_a_resume_reach_the_trainer(word: str, meant: object, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(
        train, "_loaded", lambda script, args, model: asked.append(args.resume_from_checkpoint) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        run(["--output_dir", "out", "--use_cpu", "--resume_from_checkpoint", word])
    assert asked == [meant]
