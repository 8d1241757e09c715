"""A plan in words: what it needs, on which card that fits, and what was assumed."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hf_lowmem.memory import human_bytes

if TYPE_CHECKING:
    from hf_lowmem.planner.simulate import Plan

__all__ = ["assumed", "in_words"]

CARDS = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192)  # GiB, as cards are sold
GIB = 2**30


def in_words(plan: "Plan") -> str:
    """What must be free, and the smallest card that has it."""
    need = human_bytes(plan.reserved_bytes)
    if plan.settings["device"] != "cuda":
        return f"A step needs {need} of memory."
    card = next((size for size in CARDS if size * GIB >= plan.reserved_bytes), None)
    each = "" if plan.settings["world_size"] == 1 else " each"
    fits = f"fits on a card of {card} GiB{each}" if card is not None else "fits on no single card"
    return f"A step needs {need}, and {fits}."


def assumed(plan: "Plan") -> str:
    """The settings of a plan, whoever set them: "8 sequences of 1,024 tokens, float32 weights, ..."."""
    settings: Mapping[str, object] = plan.settings
    rows, tokens, steps = (plan.settings[k] for k in ("sequences", "tokens", "gradient_accumulation_steps"))
    trained, whole = plan.settings["trained"], plan.settings["parameters"]
    said = [
        f"{rows} sequence{'s'[: rows != 1]} of {tokens:,} tokens" + (f", {steps} times a step" if steps > 1 else ""),
        f"{settings['dtype']} weights",
        "all parameters trained" if trained == whole else f"{trained:,} of {whole:,} parameters trained",
        f"optim={settings['optim']}" + (f" ({settings['implementation']})" if settings["implementation"] else ""),
        *(f"{name}={value}" for name, value in plan.settings["lowmem"].items()),
        "checkpointing" if settings["gradient_checkpointing"] else "no checkpointing",
    ]
    if settings["world_size"] != 1:
        said.append(f"{settings['world_size']} processes, {settings['parallel']}")
    return ", ".join([*said, f"on {settings['device']}"])
