"""Modules of 0.1 by the names that its files say: a `training_args.bin` names the module of its class.

Whoever asks for such a name gets a module that finds its attributes in the one that took its place.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Of each, where its attributes are now: the first that has one. The first versions had all configs in `arguments`.
MOVED = {
    "hf_lowmem.arguments": ("arguments", "sft", "dpo_config", "wrap"),
    "hf_lowmem.sft": ("sft",),
    "hf_lowmem.dpo": ("dpo",),
    "hf_lowmem.dpo_config": ("dpo_config",),
    "hf_lowmem.wrap": ("wrap",),
}


class Finder:
    """Finder and loader of such names. No base class: `importlib.abc` takes longer to import than all the rest."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a module that has moved; None for every other name."""
        return ModuleSpec(fullname, self) if fullname in MOVED else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """None: an empty module is what is wanted."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Let the module find its attributes in the one that took its place."""

        def find(name: str) -> Any:
            if not name.startswith("__"):
                for place in MOVED[module.__name__]:
                    found = import_module(f"hf_lowmem.training.{place}")
                    if hasattr(found, name):
                        return getattr(found, name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = find  # type: ignore[method-assign]


def find_moved() -> None:
    """From now on, modules of 0.1 are found."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())
