"""tests/public_api.txt, and how docstrings begin."""

import ast
import difflib
import re

from tests.house.package import trees
from tests.house.public import LIST, documented, dump

# A docstring opens with a noun or a verb: after one of these a reader has to guess what is spoken of.
FIRST_WORDS = {
    "Of", "As", "By", "From", "What", "How",
    "After", "At", "For", "In", "Inside", "Into", "Once", "Those", "Through", "Under", "While", "Whose",
}  # fmt: skip


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


def offenders(tree: ast.Module) -> list[str]:
    """Names of what has a docstring with a bad first word."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [(n, ast.get_docstring(n)) for n in ast.walk(tree) if isinstance(n, kinds)]
    return [getattr(n, "name", "the module") for n, text in found if text and opening(text) in FIRST_WORDS]


def test_docstrings_open_with_a_noun_or_a_verb() -> None:
    assert not {path: found for path, tree in trees().items() if (found := offenders(tree))}


def test_a_bad_opening_is_found() -> None:
    code = '"""What it is."""\ndef f():\n    """Of it."""\ndef g():\n    """Offers it."""\nclass A:\n    """As, B."""'
    assert offenders(ast.parse(code)) == ["the module", "f", "A"]
