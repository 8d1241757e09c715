"""Which versions are allowed, and the one place of our own."""

import tomllib
from importlib.metadata import version
from typing import Any

import pytest
from packaging.requirements import Requirement

import hf_lowmem
from tests.house.package import PACKAGE, ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
NEEDED = {r.name: r for r in map(Requirement, PROJECT["project"]["dependencies"])}
# Their private names are used, and change in minor releases.
BOUNDED = ("transformers", "accelerate", "trl", "peft")


@pytest.mark.parametrize("name", BOUNDED)
def test_a_minor_release_that_was_not_tested_is_not_installed(name: str) -> None:
    bounds = {s.operator: s.version for s in NEEDED[name].specifier}
    assert set(bounds) == {">=", "<"}
    assert len(bounds["<"].split(".")) == 2, "a whole minor release"


@pytest.mark.parametrize("name", NEEDED)
def test_the_installed_versions_are_allowed(name: str) -> None:
    assert version(name).partition("+")[0] in NEEDED[name].specifier


def test_the_version_stands_once() -> None:
    assert "version" not in PROJECT["project"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "hf_lowmem/__init__.py"
    [line] = [line for line in (PACKAGE / "__init__.py").read_text().splitlines() if line.startswith("__version__")]
    assert line == f'__version__ = "{hf_lowmem.__version__}"'


def test_the_wheel_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
