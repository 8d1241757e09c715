"""A plan in words: what it needs, on which card that fits, and what was assumed."""

from typing import Any

from hf_lowmem.memory import human_bytes

__all__ = ["assumed", "in_words"]

CARDS = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192)  # GiB, as cards are sold
GIB = 2**30
Settings = dict[str, Any]


def in_words(need: int, settings: Settings) -> str:
    """Sentence of what must be free, and the smallest card that has it.

    Args:
        need: `Plan.reserved_bytes`.
        settings: `Plan.settings`.
    """
    if settings["device"] != "cuda":
        return f"A step needs {human_bytes(need)} of memory."
    card = next((size for size in CARDS if size * GIB >= need), None)
    each = "" if settings["world_size"] == 1 else " each"
    fits = f"fits on a card of {card} GiB{each}" if card is not None else "fits on no single card"
    return f"A step needs {human_bytes(need)}, and {fits}."


def assumed(settings: Settings) -> str:
    """Settings of a plan, whoever set them: "8 sequences of 1,024 tokens, float32 weights, ..."."""
    rows, tokens, steps = (settings[k] for k in ("sequences", "tokens", "gradient_accumulation_steps"))
    trained, whole = settings["trained"], settings["parameters"]
    said = [
        f"{rows} sequence{'s'[: rows != 1]} of {tokens:,} tokens" + (f", {steps} times a step" if steps > 1 else ""),
        f"{settings['dtype']} weights",
        "all parameters trained" if trained == whole else f"{trained:,} of {whole:,} parameters trained",
        f"optim={settings['optim']}" + (f" ({settings['implementation']})" if settings["implementation"] else ""),
        *(f"{name}={value}" for name, value in settings["lowmem"].items()),
        "checkpointing" if settings["gradient_checkpointing"] else "no checkpointing",
    ]
    if settings["world_size"] != 1:
        said.append(f"{settings['world_size']} processes, {settings['parallel']}")
    return ", ".join([*said, f"on {settings['device']}"])
