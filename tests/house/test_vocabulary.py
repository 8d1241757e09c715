"""Retired words do not come back: the column "not" of the table "Words" in .github/CONTRIBUTING.md.

Most of them are good English elsewhere ("fits within the budget", a release on PyPI). So each is looked for in the
names that a file gives to things, in the rooms where it had the retired meaning. The few that mean nothing else here
are looked for in prose, too: comments, docstrings, texts of errors, READMEs. What is quoted, as `this` or "this", is
the name of something, such as a record's key, and no prose.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.house.package import ROOT

MODULE, CALLABLE, VARIABLE = "module", "function or class", "argument, variable or attribute"
ALL = (MODULE, CALLABLE, VARIABLE)
PYTHON = ("hf_lowmem", "scripts", "tests", "integrations")
# What says so itself: this list, and 0.1's names of modules.
EXEMPT = ("tests/house/test_vocabulary.py", "hf_lowmem/moved.py")
# History, the table, and the cards of models that were published.
UNREAD = ("CHANGELOG.md", ".github/CONTRIBUTING.md", "model_cards/smollm2-135m-shakespeare.md")


@dataclass(frozen=True)
class Retired:
    """One cell of the column "not".

    Attributes:
        pattern: of the words, in lower case with one underscore between two.
        places: paths below which no name has them.
        kinds: the kinds of names that are looked at.
        whole: only a name that consists of nothing else: `low`, not `low_rank`.
        prose: a pattern that no text of the repository has.
    """

    pattern: str
    places: tuple[str, ...] = PYTHON
    kinds: tuple[str, ...] = ALL
    whole: bool = False
    prose: str | None = None


LOW_RANK = ("hf_lowmem/optim/lowrank", "hf_lowmem/kernels/apollo", "tests/kernels/test_apollo.py")
STEPS = ("hf_lowmem/optim", "hf_lowmem/kernels", "hf_lowmem/training", "tests/optim")
RETIRED = {
    "foretold": Retired("foret(old|ells?|elling)", prose="foret(old|ells?|elling)"),
    "sound": Retired("sound", STEPS, prose="sound gradients?|gradients? (is|are) (not )?sound"),
    "down, low": Retired("down|low", LOW_RANK, whole=True),
    "lift": Retired("lift(s|ed|ing)?", (*LOW_RANK, "hf_lowmem/distributed.py", "tests/optim", "tests/peers")),
    "fold": Retired("fold(s|ed|ing)?", STEPS),
    "release": Retired("releas(es?|ed|ing)", STEPS),
    "seek, compose, within": Retired("seek|compose|within", ("hf_lowmem/planner",), (MODULE, CALLABLE), whole=True),
    "waits for the device": Retired("waits(_for_the_device)?", (*STEPS, "hf_lowmem/planner")),
    "pairs": Retired("pairs", ("hf_lowmem", "tests/preference"), (MODULE,), whole=True),
    "mode, level": Retired("mode|level", ("hf_lowmem/activations",), (CALLABLE, VARIABLE), whole=True),
    # Not `Dither`, the published name of the random numbers that round a state.
    "dithered": Retired("dithered", prose="dithered"),
}
# The right use and the wrong one are the same word in the same rooms.
BY_EYE = {"reference for anything else"}


def words_of(name: str) -> str:
    """A name in lower case with an underscore between its words: `SomeName`, `_SOME_NAME` → some_name."""
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return re.sub(r"_+", "_", parted).strip("_").lower()


def names_in(tree: ast.AST) -> Iterator[tuple[str, str, int]]:
    """(kind, name, line) of each name that a file gives to something. What it only reads may be somebody else's."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield CALLABLE, node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield VARIABLE, node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield VARIABLE, node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield VARIABLE, node.attr, node.lineno
        elif isinstance(node, ast.alias) and node.asname:
            yield VARIABLE, node.asname, 0


def prose_in(code: str) -> Iterator[tuple[str, int]]:
    """(text, line) of comments and strings. A string that is one word with no space is a key or a name."""
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.COMMENT:
            yield token.string, token.start[0]
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.value, node.lineno


def unquoted(text: str) -> str:
    return re.sub(r"``?[^`\n]+``?|\"[^\"\n]+\"", "", text)


def offences_in_names(path: str, tree: ast.AST, retired: dict[str, Retired] = RETIRED) -> list[str]:
    """Names in a Python file that have a retired word, with its path among them: each room and the file itself."""
    places = [(MODULE, part.removeprefix("test_").removesuffix(".py"), 0) for part in path.split("/")]
    here = {
        words: re.compile(rf"({rule.pattern})" if rule.whole else rf"(.*_)?({rule.pattern})(_.*)?")
        for words, rule in retired.items()
        if any(path == place or path.startswith(place + "/") for place in rule.places)
    }
    given = {(kind, name): line for kind, name, line in (*places, *names_in(tree))}
    return [
        f"{path}:{line}: {kind} {name!r} ({words})"
        for (kind, name), line in given.items()
        if not (path.startswith("tests/") and name.startswith("test_"))  # the name of a test is a sentence
        for words, pattern in here.items()
        if kind in retired[words].kinds and pattern.fullmatch(words_of(name))
    ]


def offences_in_prose(path: str, texts: Iterator[tuple[str, int]]) -> list[str]:
    """Texts that have a word which means nothing but what is retired."""
    patterns = [(words, re.compile(rf"\b({rule.prose})\b", re.I)) for words, rule in RETIRED.items() if rule.prose]
    return [
        f"{path}:{line}: {match.group()!r} ({words})"
        for text, line in texts
        for words, pattern in patterns
        if pattern.search(text)
        for match in pattern.finditer(unquoted(text))
    ]


@cache
def python() -> dict[str, str]:
    files = sorted(file for place in PYTHON for file in (ROOT / place).rglob("*.py"))
    found = {file.relative_to(ROOT).as_posix(): file.read_text() for file in files}
    return {path: code for path, code in found.items() if path not in EXEMPT}


def markdown() -> list[Path]:
    places = [*ROOT.glob("*.md"), *(f for place in (*PYTHON, "model_cards") for f in (ROOT / place).rglob("*.md"))]
    return [file for file in places if file.relative_to(ROOT).as_posix() not in UNREAD]


def table() -> set[str]:
    """The column "not" of the table in CONTRIBUTING.md."""
    lines = (ROOT / ".github" / "CONTRIBUTING.md").read_text().partition("| say | not |\n")[2].splitlines()
    rows = [line.strip("|").split("|") for line in lines[1:] if line.startswith("|")]
    return {cell.strip() for _, cell in rows}


def test_no_name_has_a_retired_word() -> None:
    assert not [text for path, code in python().items() for text in offences_in_names(path, ast.parse(code))]


def test_no_prose_has_a_retired_word() -> None:
    somewhere = re.compile("|".join(rule.prose for rule in RETIRED.values() if rule.prose), re.I)
    read = {path: code for path, code in python().items() if somewhere.search(code)}
    assert not [text for path, code in read.items() for text in offences_in_prose(path, prose_in(code))]
    assert len(markdown()) > 5
    for file in markdown():
        numbered = ((line, i) for i, line in enumerate(file.read_text().splitlines(), 1))
        assert not offences_in_prose(file.relative_to(ROOT).as_posix(), numbered)


def test_the_table_lists_what_is_looked_for() -> None:
    assert table() == set(RETIRED) | BY_EYE


@pytest.mark.parametrize("words", RETIRED)
def test_each_cell_is_found_by_its_own_words(words: str) -> None:
    rule = RETIRED[words]
    for word in words.split(", "):
        name = word.replace(" ", "_")
        if VARIABLE in rule.kinds:
            path, tree = f"{rule.places[0]}/a.py", ast.parse(f"def f({name}): ...")
        elif CALLABLE in rule.kinds:
            path, tree = f"{rule.places[0]}/a.py", ast.parse(f"def {name}(): ...")
        else:
            path, tree = f"{rule.places[0]}/{name}/a.py", ast.parse("")
        assert offences_in_names(path, tree)
        assert not offences_in_names("elsewhere/a.py", tree)


@pytest.mark.parametrize(
    ("path", "code", "found"),
    [
        ("hf_lowmem/runs/a.py", "foretold_bytes = 1", True),
        ("hf_lowmem/runs/a.py", "class ForetoldBytes: ...", True),
        ("hf_lowmem/runs/a.py", "def f():\n    self.foretold = 1", True),
        ("hf_lowmem/runs/a.py", "from b import c as foretold", True),
        ("hf_lowmem/runs/a.py", 'row["foretold"]', False),
        ("hf_lowmem/optim/fold.py", "", True),
        ("hf_lowmem/optim/a.py", "def is_sound(grad): ...", True),
        ("tests/activations/a.py", "sound = 1", False),
        ("hf_lowmem/runs/a.py", "folder = 1", False),
        ("hf_lowmem/optim/lowrank/a.py", "low = 1", True),
        ("hf_lowmem/optim/lowrank/a.py", "low_rank = 1", False),
        ("hf_lowmem/specs.py", "low = 1", False),
        ("hf_lowmem/optim/a.py", "def release_hooks(): ...", True),
        ("hf_lowmem/checkpoints/a.py", "def is_older_release(): ...", False),
        ("hf_lowmem/planner/search/compose.py", "", True),
        ("hf_lowmem/planner/a.py", "def within_budget(): ...", False),
        ("hf_lowmem/checkpoints/a.py", "file.seek(0)", False),
        ("hf_lowmem/preference/pairs/a.py", "", True),
        ("hf_lowmem/preference/a.py", "pairs = 1", False),
        ("hf_lowmem/activations/a.py", "def convert(level): ...", True),
        ("hf_lowmem/activations/a.py", "def in_eval_mode(): ...", False),
        ("tests/optim/test_a.py", "def test_a_release_is_found(): ...", False),
        ("tests/optim/test_a.py", "release = 1", True),
    ],
)
def test_names_that_are_found(path: str, code: str, found: bool) -> None:
    assert bool(offences_in_names(path, ast.parse(code))) is found


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ('"""Bytes as foretold by a plan."""', True),
        ("# Foretells the peak", True),
        ('raise ValueError(f"{x} was foretold")', True),
        ("# leaves out what is no sound gradient", True),
        ("# codes are dithered", True),
        ('"""In format 1 the plan was called "foretold"."""', False),
        ('row["foretold_bytes"]', False),
        ("# `foretold` stands beside the measured bytes", False),
        ("# a sound checkpoint; sound and images", False),
        ("# lifted, folded, released within this mode", False),
    ],
)
def test_prose_that_is_found(code: str, found: bool) -> None:
    assert bool(offences_in_prose("a.py", prose_in(code))) is found
