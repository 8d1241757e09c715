"""Help: a screen for each command, with an example that its own parser takes."""

import re
import shlex

import pytest

from hf_lowmem import __version__
from hf_lowmem.cli.main import main
from hf_lowmem.cli.screens import EXAMPLES, SCREENS

LINES, COLUMNS = 40, 120


def printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    try:
        status = main(words)
    except SystemExit as end:
        status = end.code
    assert status == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return shown.out


@pytest.mark.parametrize("command", EXAMPLES)
def test_help_fits_a_screen_and_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed([command, "--help"], capsys).splitlines()
    assert lines[0].startswith(f"usage: hf-lowmem {command}")
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS
    example = " ".join(EXAMPLES[command].replace("\\\n", " ").split())
    assert example in " ".join(" ".join(lines).replace("\\", " ").split())


def test_the_program_s_own_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed(["--help"], capsys)
    assert all(f"\n    {command} " in shown for command in EXAMPLES)
    assert len(shown.splitlines()) <= LINES


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(["--version"], capsys) == f"hf-lowmem {__version__}\n"


@pytest.mark.parametrize("command", ["sft", "dpo", "plan"])
def test_all_flags_are_listed_on_stdout_and_the_screen_names_none_that_is_not_there(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"--config", *re.findall(r"--\w+", printed([command, "--help-all"], capsys))}  # TrlParser reads --config
    rows = [line for line in SCREENS[command].splitlines() if line.startswith("  --")]
    named = {flag for line in rows for flag in re.findall(r"--\w+", line)}
    assert len(named) > 5
    assert named <= known
    assert {word for word in shlex.split(EXAMPLES[command]) if word.startswith("--")} <= known


def test_help_of_a_script_is_the_script_s(monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[list[str]] = []
    monkeypatch.setattr("hf_lowmem.cli.launch.launch", lambda words: handed.append(list(words)) or 0)
    assert main(["launch", "script.py", "--help"]) == 0
    assert handed == [["script.py", "--help"]]
