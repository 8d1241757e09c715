"""Rule: when it holds for a run, and what it says then."""

from collections.abc import Callable
from dataclasses import dataclass

from hf_lowmem.rules.run import Run

Words = str | Callable[[Run], str]


@dataclass(frozen=True)
class Rule:
    """One thing that is refused.

    Args:
        name: for tests.
        facts: the facts of a run that it looks at; it is skipped where one of them is not known.
        when: whether it refuses a run of which they are known.
        message: the fields with their values, and the reason.
        remedy: what to set instead; empty where the message ends with it.
    """

    name: str
    facts: tuple[str, ...]
    when: Callable[[Run], bool]
    message: Words
    remedy: Words

    def refusal(self, run: Run) -> str | None:
        """The text with which a run is refused, or None."""
        if any(getattr(run, fact) is None for fact in self.facts) or not self.when(run):
            return None
        said = [words if isinstance(words, str) else words(run) for words in (self.message, self.remedy)]
        return f"{'. '.join(filter(None, said)).removesuffix('.')}."


def apart(setting: str, ours: str, reason: str, remedy: Words, *, when: Callable[[Run], bool] | None = None) -> Rule:
    """The rule that a fact does not go with one that asks something of us."""

    def both(run: Run) -> bool:
        return bool(getattr(run, setting) and getattr(run, ours))

    def message(run: Run) -> str:
        return f"{run.say(setting)} cannot be combined with {run.say(ours)}: {reason}"

    return Rule(f"{ours}_{setting}", (setting, ours), when or both, message, remedy)
