"""Modules of 0.1 by the names that they had: a `training_args.bin` names the module of its class, and scripts import.

Whoever asks for such a name gets a module that finds its attributes in those that took its place. This file alone names
rooms that stand above it, and imports none of them before it is asked.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Of each, below hf_lowmem, where its attributes are now: the first that has one. What was below it is below the first.
MOVED = {
    "arguments": ("training.arguments", "training.sft", "training.dpo_config", "training.wrap"),
    "callbacks": ("training.callbacks",),
    "card_commands": ("cli.cards",),
    "codecs.weights": ("weights",),
    "cards": ("runs",),
    "cards.record": ("runs.record", "runs.history"),
    "doctor": ("cli.doctor",),
    "dpo": ("training.dpo",),
    "dpo_config": ("training.dpo_config",),
    "launch": ("cli.launch",),
    "losses": ("preference.losses",),
    "losses.collate": ("preference.collate",),
    "model_card": ("runs.model_card",),
    "own_defaults": ("training.own_defaults",),
    "pairs": ("preference.sharing",),
    "plugin": ("training.plugin",),
    "reference": ("preference.reference",),
    "report": ("runs.callback",),
    "section": ("training.section",),
    "sft": ("training.sft",),
    "skips": ("runs.skips",),
    "trainer": ("training.mixin",),
    "wrap": ("training.wrap",),
}


def places(fullname: str) -> tuple[str, ...]:
    """Places where the attributes of a module are now, by name; empty for one that has not moved."""
    room, _, name = fullname.partition(".")
    if room != "hf_lowmem":
        return ()
    if name not in MOVED:
        parent, _, name = name.partition(".")
        return (f"hf_lowmem.{MOVED[parent][0]}.{name}",) if name and parent in MOVED else ()
    return tuple(f"hf_lowmem.{place}" for place in MOVED[name])


class Finder:
    """Finder and loader of such names. No base class: `importlib.abc` takes longer to import than all the rest."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a module that has moved; None for every other name."""
        if not places(fullname):
            return None
        return ModuleSpec(fullname, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """None: an empty module is what is wanted."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Let the module find its attributes in those that took its place.

        Raises:
            ModuleNotFoundError: where there is no such module any more.
        """
        homes = [import_module(place) for place in places(module.__name__)]

        def find(name: str) -> Any:
            for home in homes:
                if not name.startswith("__") and hasattr(home, name):
                    return getattr(home, name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = find


def find_moved() -> None:
    """Let modules be imported by their names of 0.1 from now on."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())
