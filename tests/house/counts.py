"""What may only become less: `python -m tests.house.write counts` writes today's numbers to counts.json."""

import ast
import io
import json
import re
import tokenize
from collections import Counter
from pathlib import Path

from tests.house.package import PACKAGE, ROOT, TESTS

LIST = TESTS / "house" / "counts.json"
# Comments that switch a tool off.
SWITCHES = {
    "type: ignore": re.compile(r"#\s*(type|pyright):\s*ignore"),
    "pyright: off": re.compile(r"#\s*pyright:\s*(basic|report)"),
    "noqa": re.compile(r"#\s*noqa"),
    "fmt: skip": re.compile(r"#\s*fmt:\s*(skip|off)"),
}


def count(code: str) -> Counter[str]:
    """`Any` as a name, and the comments of SWITCHES, in a file."""
    found = Counter(dict.fromkeys(("Any", *SWITCHES), 0))
    found["Any"] = sum(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(ast.parse(code)))
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.COMMENT:
            for name, pattern in SWITCHES.items():
                found[name] += sum(1 for _ in pattern.finditer(token.string))
    return found


def files() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *(ROOT / "scripts").rglob("*.py")])


def counted() -> dict[str, int]:
    return dict(sum((count(path.read_text()) for path in files()), Counter[str]()))


def listed() -> dict[str, int]:
    return json.loads(LIST.read_text())


def write() -> None:
    LIST.write_text(json.dumps(counted(), indent=1) + "\n")
