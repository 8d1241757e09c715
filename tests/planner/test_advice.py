"""The Step law: its figures for a Llama whose parameters are counted by hand, and its door."""

import json
from pathlib import Path

import pytest

from hf_lowmem.cli.main import main
from hf_lowmem.planner.advice import parse_tokens, step_law
from tests.planner.real import small_config

INNER = 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 704 * 256 + 2 * 256) + 256  # two layers and the last norm


@pytest.mark.parametrize("tied", [False, True])
def test_the_law_is_of_parameters_without_embeddings(tied: bool) -> None:
    made = step_law(small_config(num_hidden_layers=2, tie_word_embeddings=tied), 10**9, 2048)
    assert made.parameters == INNER
    assert made.learning_rate == pytest.approx(1.79 * INNER**-0.713 * 1e9**0.307, rel=1e-12)
    assert made.batch_tokens == round(0.58 * 1e9**0.571) == 79_878
    assert made.sequences == 39
    assert made.final_rate == 1e-5


def test_numbers_of_tokens() -> None:
    assert [parse_tokens("x", t) for t in ("20B", "1.5m", "2e10", "300 K")] == [
        20 * 10**9,
        1_500_000,
        2 * 10**10,
        300_000,
    ]
    for text in ("", "B", "-3M", "0", "many", "nan", "inf"):
        with pytest.raises(ValueError, match=r"--advise=.*such as 20B"):
            parse_tokens("--advise", text)


@pytest.mark.train
def test_the_command_says_it_beside_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_config(num_hidden_layers=2).save_pretrained(tmp_path)
    command = ["plan", "--model", str(tmp_path), "--max_length", "32", "--per_device_train_batch_size", "1"]
    assert main([*command, "--advise", "1B"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("advice: pre-training on 1,000,000,000 tokens, by the Step law")
    assert "not for fine-tuning" in line
    assert main([*command, "--advise", "1B", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["advice"]["parameters"] == INNER
    for wrong in (["--use_peft"], ["--method", "dpo"]):
        assert main([*command, "--advise", "1B", *wrong]) == 2
        assert "the Step law is of pre-training" in capsys.readouterr().err
