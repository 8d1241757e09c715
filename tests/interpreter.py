"""Triton's interpreter, twice as quick: it stands in for triton.language once a launch, not once a device function.

Before each device function that a kernel calls, `_patch_lang` looks through all members of the language for functions
that the launch has replaced already, which took half of the time of the tests that interpret kernels. What stands in
for what is the same.
"""

from collections.abc import Callable
from typing import Any

from triton import language
from triton.runtime import interpreter


class _Within:
    """The scope of a device function, in a launch that has replaced all that it sees: nothing to put back."""

    def restore(self) -> None:
        return None


class PatchOnce:
    """Stands in for `triton.runtime.interpreter._patch_lang`."""

    def __init__(self, patch: Callable[[Any], Any]) -> None:
        self.patch = patch
        self.replaced = frozenset[str]()
        self._seen: dict[Any, frozenset[str]] = {}

    def __call__(self, function: Any) -> Any:
        seen = self._seen.get(function)
        if seen is None:
            modules = [v for v in function.__globals__.values() if v is language or v is language.core]
            seen = self._seen[function] = frozenset(m.__name__ for m in modules)
        if seen and seen <= self.replaced:
            return _Within()
        scope, before = self.patch(function), self.replaced
        self.replaced = before | seen
        restore = scope.restore

        def restored() -> None:
            self.replaced = before
            restore()

        scope.restore = restored
        return scope


def patch_once() -> None:
    if not isinstance(interpreter._patch_lang, PatchOnce):
        interpreter._patch_lang = PatchOnce(interpreter._patch_lang)
