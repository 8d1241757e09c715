"""Ways around the tools: there may be fewer of them, never more."""

from tests.house.counts import count, counted, listed


def test_the_counts_fall_only() -> None:
    now, before = counted(), listed()
    risen = {name: f"{before.get(name)} -> {n}" for name, n in now.items() if n > before.get(name, -1)}
    assert not risen, f"a type, a rule or a layout was switched off once more; find another way: {risen}"
    fallen = {name: f"{before[name]} -> {n}" for name, n in now.items() if n < before[name]}
    assert not fallen, f"python -m tests.house.write counts, so that it stays that way: {fallen}"


def test_what_is_counted() -> None:
    code = """
from typing import Any
x: Any = "Any # noqa"  # type: ignore[x]
y: dict[str, Any] = {}  # noqa: E1  # fmt: skip
# pyright: reportAttributeAccessIssue=false
# pyright: strict
"""
    assert count(code) == {"Any": 2, "type: ignore": 1, "pyright: off": 1, "noqa": 1, "fmt: skip": 1}
