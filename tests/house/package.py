"""The package as text: its files, parsed once, and where each thing stands."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "hf_lowmem"
TESTS = ROOT / "tests"


@cache
def trees() -> dict[str, ast.Module]:
    """Path below the package → its code."""
    return {f.relative_to(PACKAGE).as_posix(): ast.parse(f.read_text()) for f in sorted(PACKAGE.rglob("*.py"))}


def module_of(path: str) -> str:
    """Name of a module by its path below the package."""
    return ".".join(("hf_lowmem", *Path(path).with_suffix("").parts)).removesuffix(".__init__")


def lines_of(path: Path) -> list[str]:
    """The lines of a list, without its comments."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]
