"""tests/public_api.txt, and what the docstrings of the public API owe a reader."""

import ast
import difflib
import re

import pytest

from tests.house.package import trees
from tests.house.public import LIST, documented, dump

# A docstring opens with a noun or a verb: after one of these a reader has to guess what is spoken of.
FIRST_WORDS = {"Of", "As", "By", "From", "What", "How"}
# Rooms in which every docstring is held to that, not the public ones alone.
HELD: tuple[str, ...] = ("patching", "reasons", "specs")


def test_the_public_api_is_what_the_list_says() -> None:
    listed = LIST.read_text().splitlines()
    changes = list(difflib.unified_diff(listed, dump(), "tests/public_api.txt", "the code", lineterm="", n=0))
    assert not changes, "\n".join(
        [
            *changes,
            "If this is meant: python -m tests.house.write public, and a line in CHANGELOG.md for whoever uses it.",
        ]
    )


def opening(docstring: str) -> str:
    return re.split(r"[\s,:;.]", docstring.strip(), maxsplit=1)[0]


def test_all_that_is_public_is_documented() -> None:
    assert not [path for path, text in documented() if not (text or "").strip()]


def test_public_docstrings_open_with_a_noun_or_a_verb() -> None:
    assert not {path: text.strip()[:60] for path, text in documented() if text and opening(text) in FIRST_WORDS}


def offenders(tree: ast.Module) -> list[str]:
    """Names of what has a docstring with a bad first word."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [(n, ast.get_docstring(n)) for n in ast.walk(tree) if isinstance(n, kinds)]
    return [getattr(n, "name", "the module") for n, text in found if text and opening(text) in FIRST_WORDS]


@pytest.mark.parametrize("room", HELD)
def test_docstrings_of_a_room_open_with_a_noun_or_a_verb(room: str) -> None:
    paths = [path for path in trees() if path.partition("/")[0].removesuffix(".py") == room]
    assert not {path: found for path in paths if (found := offenders(trees()[path]))}


def test_a_bad_opening_is_found() -> None:
    code = '"""What it is."""\ndef f():\n    """Of it."""\ndef g():\n    """Offers it."""\nclass A:\n    """As, B."""'
    assert offenders(ast.parse(code)) == ["the module", "f", "A"]
