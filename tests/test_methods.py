"""The table of methods and their sources: nothing is missing; each row has a paper, a test, a command and a limit.

Its commands are given to their parsers together with those of the READMEs, in tests/test_readme_code.py.
"""

import re

import pytest

from hf_lowmem.optim import OPTIMIZERS
from hf_lowmem.preference.losses import PREFERENCE_LOSSES
from tests.readmes import READMES, ROOT

PAGE = READMES["scripts/README.md"].split("## Methods and their sources")[1].split("\n## ")[0]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")][
    1:
]
SCRIPTS = {path.name for path in (ROOT / "scripts").glob("*.py")}
COMMON = {"train_sft.py", "train_preference.py"}  # of all methods
SOURCES = [path for folder in ("hf_lowmem", "scripts") for path in (ROOT / folder).rglob("*.py")]
DATA = [
    "--model_name_or_path",
    "MODEL",
    "--dataset_name",
    "DATA",
    "--output_dir",
    "OUT",
    "--use_cpu",
    "--bf16",
    "False",
]


def code(cell: str) -> str:
    (found,) = re.findall(r"`([^`]+)`", cell)
    return found


def method_commands() -> list[list[str]]:
    """The commands of all rows."""
    return [words for row in ROWS for words in commands(row)]


def commands(row: list[str]) -> list[list[str]]:
    """What a row's command stands for: flags of hf-lowmem, or what a script's own first lines say."""
    words = code(row[2]).split()
    if words[0] == "plan":
        return [["hf-lowmem", *words, "--model", "MODEL"]]
    if not words[0].endswith(".py"):
        return [["hf-lowmem", *words, *DATA]]
    head = (ROOT / "scripts" / words[0]).read_text(encoding="utf-8").split('"""')[1].replace("\\\n", " ")
    lines = [line.split() for line in head.splitlines() if line.strip().startswith(f"python scripts/{words[0]}")]
    trains = [[*words, "--use_cpu", "--bf16", "False"] if "--dataset_name" in words else words for words in lines]
    assert trains, f"scripts/{words[0]} gives no command"
    return trains


def test_no_method_and_no_script_is_missing() -> None:
    named = [code(row[2]) for row in ROWS]
    wanted = {f"sft --optim {name}" for name in OPTIMIZERS} | {f"dpo --loss_type {name}" for name in PREFERENCE_LOSSES}
    assert wanted | (SCRIPTS - COMMON) <= set(named)
    assert len(set(named)) == len(named)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_has_a_paper_a_test_and_a_limit(row: list[str]) -> None:
    _, paper, command, test, limit = row
    paper = code(paper)
    assert re.fullmatch(r"\d{4}\.\d{5}", paper)
    assert limit
    path = ROOT / code(test)
    text = path.read_text(encoding="utf-8")
    assert "def test_" in text
    name = code(command).split()[-1 if ".py" not in command and "--advise" not in command else 0]
    script = ROOT / "scripts" / name
    if name.endswith(".py"):
        head = script.read_text(encoding="utf-8").split('"""')[1]
        assert paper in head, f"{name} does not name its paper"
        assert re.search(r"\bNot for\b", head), f"{name} does not say when not to use it"
        assert script.stem in text, f"{code(test)} does not test {name}"
    else:
        assert any(paper in source.read_text(encoding="utf-8") for source in SOURCES), "no code names the paper"
