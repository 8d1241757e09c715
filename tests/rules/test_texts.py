"""No refusal stands twice: its words are in one place, and whoever refuses takes them from there."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORDS = 12  # in a row: fewer are turns of phrase, such as "expected True or False"
SAY = {"Rule", "apart", "_setting"}


def texts(tree: ast.AST) -> list[str]:
    """The literal words of errors that are raised, and of rules."""
    found: set[ast.expr] = set()
    for node in ast.walk(tree):
        called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in SAY
        if isinstance(node, ast.Raise) or called:
            found |= {n for n in ast.walk(node) if isinstance(n, ast.Constant)}
    return [n.value for n in found if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def copies(files: dict[str, str]) -> dict[str, list[str]]:
    """Runs of words that stand in more than one literal, with the names of their files."""
    where: dict[str, set[tuple[str, int]]] = defaultdict(set)
    for name, code in files.items():
        for index, text in enumerate(texts(ast.parse(code))):
            words = text.split()
            for first in range(len(words) - WORDS + 1):
                where[" ".join(words[first : first + WORDS])].add((name, index))
    return {said: sorted(name for name, _ in at) for said, at in where.items() if len(at) > 1}


def test_no_text_of_a_refusal_stands_twice() -> None:
    paths = [*(ROOT / "hf_lowmem").rglob("*.py"), *(ROOT / "integrations").rglob("*.py")]
    found = copies({str(path.relative_to(ROOT)): path.read_text() for path in paths})
    assert not found, "\n".join(f"{said!r}: {files}" for said, files in found.items())


def test_the_walk_finds_a_second_copy() -> None:
    words = "a reason that is long enough to be one, and with it its remedy"
    files = {"a.py": f"raise ValueError(f'{{x}}: {words}.')", "b.py": f"r = Rule('a', (), f, '{words}', '')"}
    assert set(map(tuple, copies(files).values())) == {("a.py", "b.py")}
